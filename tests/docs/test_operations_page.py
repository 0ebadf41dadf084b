"""docs/operations.md has a section on every alarm that the code can raise, and on none that it can't."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from elastictrain import errors
from elastictrain.cli.outcome import STOPPED
from elastictrain.control.budget import Blame
from elastictrain.events import SkipReason
from elastictrain.tracking.alerts import ALERTS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
RAISED_BY = {"Warned": 1, "Warn": 0, "warn": 0, "KeeperTrouble": 0}
"""What makes a warning, and which of its arguments is the topic."""


def sections(title: str) -> list[str]:
    """The code that a part's sections are named after."""
    part = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    return re.findall(r"^### `(\w+)`$", part, re.M)


def rows(after: str) -> list[str]:
    """The first cells of the table after this line."""
    table = PAGE.split(after)[1].split("\n\n")[1]
    return [re.sub(r"`", "", line.split("|")[1]).strip() for line in table.splitlines()[2:]]


def topics() -> Iterator[str]:
    for path in (ROOT / "elastictrain").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = getattr(node.func, "attr", getattr(node.func, "id", "")) if isinstance(node, ast.Call) else ""
            if name in RAISED_BY and isinstance(node, ast.Call) and len(node.args) == RAISED_BY[name] + 1 + 1:
                topic = node.args[RAISED_BY[name]]
                if isinstance(topic, ast.Constant):
                    yield topic.value
    yield "checkpoint"  # CheckpointFailed is told as one


def failure_kinds() -> set[str]:
    """As the event's own documentation lists them."""
    source = (ROOT / "elastictrain" / "events.py").read_text(encoding="utf-8")
    event = source.split("class FailureDetected:")[1].split("@dataclass")[0]
    told = event.split("kind: str")[1].split('"""')[1]
    return set(re.findall(r"[a-z_]+", told.partition(":")[0])) - {"or"}


def exit_statuses() -> dict[int, set[str]]:
    found: dict[int, set[str]] = {}
    for error in vars(errors).values():
        if isinstance(error, type) and issubclass(error, errors.ElasticTrainError):
            found.setdefault(error.exit_code, set()).add(error.__name__)
    return found


def test_every_topic_of_a_warning_has_its_section() -> None:
    raised = set(topics())
    assert len(raised) > 15, "the search finds them"
    assert sections("Warnings") == sorted(raised)


def test_every_kind_of_failure_has_its_section() -> None:
    assert {"worker_lost", "driver_lost", "oom"} <= failure_kinds()
    assert set(sections("Failures")) == failure_kinds()


def test_every_alert_has_its_section() -> None:
    assert sections("Prometheus alerts") == [alert.name for alert in ALERTS]


def test_every_budget_has_its_row() -> None:
    assert set(rows("which budget was spent")) == set(get_args(Blame))


@pytest.mark.parametrize("reason", get_args(SkipReason))
def test_every_reason_to_skip_a_step_is_explained(reason: str) -> None:
    assert f"`{reason}`" in PAGE.split("### Skipped steps")[1].split("###")[0]


def test_every_exit_status_has_its_row() -> None:
    told = {int(row) for row in rows("names the value, the field and the way out.")}
    assert told == {0, STOPPED, *exit_statuses()}


def test_the_help_names_the_same_exit_statuses() -> None:
    from elastictrain.cli.app import MANUAL

    told = MANUAL.split("Exit status:")[1].split("\n\n")[0]
    assert {int(number) for number in re.findall(r"\b(\d+) [a-z]", told)} == {0, STOPPED, *exit_statuses()}
