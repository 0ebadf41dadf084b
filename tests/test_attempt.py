"""What an attempt tells of itself: that another train.steps changes the rates, that the journal waits for room."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from elastictrain.attempt import Attempt, other_rates
from elastictrain.config import TrainConfig
from elastictrain.control.vocabulary import End
from elastictrain.events import Event, RunStarted, StepCommitted, Warned
from elastictrain.runtime.home import RunHome
from elastictrain.runtime.stopping import Stop
from elastictrain.status import Status
from elastictrain.tracking.journal import JournalReader, read_journal

STEPS = 20


def run(done: int) -> list[Event]:
    config = TrainConfig.load(None, [f"train.steps={STEPS}", "train.warmup_steps=5"]).to_dict()
    steps = [StepCommitted(1, 0, step, 2.0, "", 16, 2048, 0, 1, 1e-3, 1, 0, 0) for step in range(1, done + 1)]
    return [RunStarted(0.0, "demo", 1, config, {}), *steps]


def rates(done: int, *overrides: str) -> str:
    return other_rates(run(done), TrainConfig.load(None, ["train.warmup_steps=5", *overrides]))


def test_a_longer_cosine_is_told() -> None:
    told = rates(STEPS, "train.steps=25")
    assert told.startswith("train.steps was 20 and is now 25")
    assert "0.000558 in step 21, where it would have been 0.0003" in told


@pytest.mark.parametrize(
    ("done", "overrides"),
    [
        (STEPS, [f"train.steps={STEPS}"]),
        (0, ["train.steps=25"]),  # nothing has been learned at other rates
        (10, ["train.steps=25", "train.learning_rate=3e-4", "train.min_learning_rate=3e-4"]),  # flat
    ],
)
def test_what_changes_nothing_is_not(done: int, overrides: list[str]) -> None:
    assert rates(done, *overrides) == ""


def test_a_run_that_never_was_has_no_rates() -> None:
    assert other_rates([], TrainConfig()) == ""


class Listener:
    """Remembers what was told."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def on_event(self, event: Event) -> None:
        if isinstance(event, Warned):
            self.warnings.append(f"{event.topic}: {event.message}")

    def on_status(self, status: Status) -> None:
        pass


def test_a_journal_that_waits_for_room_is_told_and_loses_nothing(disk: Callable[[str], Path]) -> None:
    small = disk("2m")
    config = TrainConfig.load(None, ["run.name=demo", f"run.storage={small}"])
    home, listener = RunHome(config), Listener()
    attempt = Attempt(config, home, JournalReader(home.folder), listener, Stop())
    attempt.begin()
    attempt.joined("of nobody")
    filler = small / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass
    steps = run(40)[1:]
    for step in steps:  # the first find room in what the disk has given to the file already
        attempt.emit(step)
    [told] = listener.warnings
    assert told.startswith("journal: can't write ")
    assert "No space left on device" in told
    filler.unlink()
    attempt.emit(Warned(0.0, "demo", "there is room"))
    assert listener.warnings[1:] == ["demo: there is room", "journal: the journal is whole again"]
    attempt.end(End("complete"))
    attempt.close()
    assert [e for e in read_journal(home.folder) if isinstance(e, StepCommitted)] == steps
