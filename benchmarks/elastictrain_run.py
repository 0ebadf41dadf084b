"""elastictrain as its user sees it: a run is begun and asked through the command line.

`train` joins the cluster, `status --json` tells the pids and `report --json` the times.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from two_nodes import Job

COMMAND = Path(sys.executable).with_name("elastictrain")
START_TIMEOUT_S = 180.0
LOOK_EVERY_S = 1.0


def wait_until_ready(train: Job, name: str, storage: Path, min_step: int) -> Any:
    """The run's status once it trains, a standby is warm and so many steps are done."""
    end = time.monotonic() + START_TIMEOUT_S
    while not _is_ready(status := ask("status", name, storage), min_step):
        train.require_running()
        if time.monotonic() > end:
            raise RuntimeError(f"no warm standby and {min_step} steps within {START_TIMEOUT_S:.0f} s: {status}")
        time.sleep(LOOK_EVERY_S)
    return status


def data_folder(name: str, storage: Path) -> Path:
    """The token shards that this run trains on."""
    return Path(ask("report", name, storage)["data"]["uri"])


def ask(what: str, name: str, storage: Path) -> Any:
    """What `elastictrain status` or `report` tells of the run; None while there is nothing."""
    command = [str(COMMAND), what, name, "--json", "--storage", str(storage)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return json.loads(answer.stdout) if answer.returncode == 0 else None


def _is_ready(status: Any, min_step: int) -> bool:
    return bool(status and status["status"] == "running" and status["standbys"] and status["step"] >= min_step)
