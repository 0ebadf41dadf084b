"""A trial as Ray Tune sees it: an actor that takes no CPU and stands on the driver's node, beside the trial's process.

Tune's checkpoint of a trial is a line of JSON that names one of the project's own. Where Tune gives a trial the
checkpoint of another (scheduler pbt), the trial begins a new leg from it; its own, or none, means to go on by name.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from ray.tune import Trainable

from elastictrain.sweep.launch import LegRun, Orders

CHECKPOINT = "checkpoint.json"


class TrialActor(Trainable):  # type: ignore[misc]  # Ray has no types
    """What it is and is told: Tune's config is {"trial": {"number": 3, "values": {...}}, "scratch": folder}."""

    def setup(self, config: dict[str, Any]) -> None:
        """Nothing starts before the first step: a checkpoint may be given first."""
        logging.getLogger("ray").setLevel(logging.WARNING)  # Tune tells of each checkpoint
        self._scratch = Path(config["scratch"])
        self._orders = Orders.read(self._scratch)
        self._values = config["trial"]["values"]
        self._name = f"{self._orders.sweep['name']}-{self._number(config['trial']['number'])}"
        self._start_from: str | None = None
        self._leg: LegRun | None = None

    def step(self) -> dict[str, Any]:
        """The next report."""
        if self._leg is None:
            self._leg = LegRun(self._scratch, self._orders, self._name, self._values, self._start_from)
        return self._leg.next_report()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Name the newest durable checkpoint."""
        told = {"trial": self._name, "checkpoint": self._leg.newest_checkpoint() if self._leg else None}
        Path(checkpoint_dir, CHECKPOINT).write_text(json.dumps(told))

    def load_checkpoint(self, checkpoint: str) -> None:
        """Begin from this one, if it is of another trial."""
        told = json.loads(Path(checkpoint, CHECKPOINT).read_bytes())
        if told["trial"] != self._name:
            self._start_from = told["checkpoint"]

    def cleanup(self) -> None:
        """Stop the trial's process."""
        if self._leg is not None:
            self._leg.stop()

    def __ray_shutdown__(self) -> None:
        """Ray ends the actor, mostly without a word of Tune's: sooner than the end of this process would tell it."""
        self.cleanup()

    def _number(self, number: int) -> int:
        """The trial's own: Tune gives one that exploits another the other's config, number and all."""
        own = self._scratch / f"{self.trial_id}.number"
        if not own.exists():
            own.write_text(str(number))
        return int(own.read_text())
