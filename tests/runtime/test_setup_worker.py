"""How a worker is started without Ray's own script, and when with it."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from elastictrain.runtime.setup_worker import command

WORKER = ["/ray/workers/default_worker.py", "--node-ip-address=127.0.0.2", "--language=PYTHON"]
PLAIN: dict[str, Any] = {"command_prefix": [], "override_worker_entrypoint": None, "java_jars": []}


def told(**context: Any) -> list[str]:
    return [*WORKER, f"--serialized-runtime-env-context={json.dumps(PLAIN | context)}"]


def test_variables_alone_need_no_ray() -> None:
    words, variables = command(told(env_vars={"MALLOC_TOP_PAD_": "64"}, py_executable="/usr/bin/python3"))
    assert words == ["/usr/bin/python3", *WORKER[:2]]
    assert variables == {"MALLOC_TOP_PAD_": "64"}


@pytest.mark.parametrize(
    "arguments",
    [
        told(command_prefix=["cd", "/work", "&&"]),
        told(override_worker_entrypoint="/in/the/container.py"),
        told(py_executable="uv run python"),
        told(env_vars={"PATH": "/more:${PATH}"}),
        told(what_a_later_ray_has="too"),
        ["/ray/workers/default_worker.py", "--language=JAVA"],
    ],
)
def test_what_is_more_is_left_to_rays_own(arguments: list[str]) -> None:
    assert command(arguments) == ([sys.executable, "/ray/workers/setup_worker.py", *arguments], {})
