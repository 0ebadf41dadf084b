"""How a command ends: one message and an exit status, the same from the command line and from a script in jobs/."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from elastictrain.errors import ElasticTrainError

STOPPED = 130
"""Exit status of what was told to stop: 128 + SIGINT, as shells have it after Ctrl-C."""


@contextmanager
def plain_errors(debug: bool = False) -> Iterator[None]:
    """End the process with `error: ...` on stderr and the error's exit status; `debug` adds its traceback.

    Only errors that this project raises on purpose: any other keeps its traceback, since it is a bug.
    """
    try:
        yield
    except ElasticTrainError as error:
        from elastictrain.tracking.redact import redact, secret_values

        told = f"{traceback.format_exc() if debug else ''}error: {error}"
        print(redact(told, secret_values(os.environ)), file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(STOPPED) from None
