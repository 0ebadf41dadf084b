"""The process of one trial: `python -m elastictrain.sweep.trial ORDER`. An elastic run like any other.

It has a Ray job of its own, so that what it holds of the cluster ends with it, however it ends. ORDER is a JSON file:
the run's config, and the file that says which slots of the cluster are the trial's now. When standard input ends (its
starter is gone) it stops as on SIGTERM: the last state is made durable.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from elastictrain.config import TrainConfig
from elastictrain.errors import ElasticTrainError
from elastictrain.progress import PlainLines
from elastictrain.sweep.launch import ERROR, STOPPED
from elastictrain.tracking.redact import redact, secret_values
from elastictrain.trainer import ElasticTrainer


def main() -> int:
    """Train to the end; the exit status is that of `elastictrain train`."""
    order = json.loads(Path(sys.argv[1]).read_bytes())
    threading.Thread(target=_stop_with_starter, name="starter", daemon=True).start()
    slots = Path(order["slots"])

    def allotment() -> Mapping[str, int]:
        try:
            found: dict[str, int] = json.loads(slots.read_bytes())
        except FileNotFoundError:
            return {}
        return found

    try:
        config = TrainConfig.from_dict(order["config"])
        result = ElasticTrainer(config, progress=PlainLines(sys.stdout), allotment=allotment).fit()
    except ElasticTrainError as error:
        told = redact(str(error), secret_values(os.environ)).replace("\n", " ")
        print(f"{ERROR}{told}", flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        return STOPPED
    return 0 if result.status == "complete" else STOPPED


def _stop_with_starter() -> None:
    while os.read(0, 4096):  # not sys.stdin, whose lock this thread would hold when the interpreter ends
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
