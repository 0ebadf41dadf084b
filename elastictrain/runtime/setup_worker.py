"""What an embedded cluster's nodes run before a worker with a runtime environment, in place of Ray's `setup_worker`.

Ray's own imports Ray to set a few variables, and the worker then imports it again: half a second of processor time for
each worker. What is more than variables is left to Ray's, which lies beside the worker's own script. Run as a file, and
by Ray, which knows it by its name.
"""

from __future__ import annotations

import json
import os
import sys

_CONTEXT = "--serialized-runtime-env-context="
_LANGUAGE = "--language="


def command(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """What to become with these arguments, and with which variables; Ray's script with all of them where it must."""
    told = [argument.removeprefix(_CONTEXT) for argument in arguments if argument.startswith(_CONTEXT)]
    context = json.loads(told[0]) if len(told) == 1 else {}
    variables = context.pop("env_vars", None) or {}
    python = context.pop("py_executable", None) or sys.executable
    special = any(context.values()) or not os.path.isabs(python) or any("$" in value for value in variables.values())
    if special or f"{_LANGUAGE}PYTHON" not in arguments:
        worker = next(argument for argument in arguments if argument.endswith("default_worker.py"))
        return [sys.executable, os.path.join(os.path.dirname(worker), "setup_worker.py"), *arguments], {}
    return [python, *(a for a in arguments if not a.startswith((_CONTEXT, _LANGUAGE)))], variables


if __name__ == "__main__":
    words, variables = command(sys.argv[1:])
    os.execve(words[0], words, os.environ | variables)
