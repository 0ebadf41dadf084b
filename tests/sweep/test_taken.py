"""Which of a cluster's placement groups a sweep leaves to others."""

from __future__ import annotations

from typing import Any

from elastictrain.runtime.slot_name import slot_name
from elastictrain.sweep.share import Taken
from elastictrain.sweep.taken import taken_by_others

A, B = "a" * 56, "b" * 56
ONE = {"CPU": 1.0}


def group(name: str, node: str, state: str = "CREATED") -> dict[str, Any]:
    return {"name": name, "state": state, "bundles": {"0": ONE}, "bundles_to_node_id": {"0": node}}


def test_what_ordinary_runs_hold_and_wait_for_is_theirs() -> None:
    groups = [
        group(slot_name("mine", 0, "10.0.0.1", A, is_trial=False), A),
        group(slot_name("mine", 1, "10.0.0.2#b", B, is_trial=False), "", "PENDING"),
        group(slot_name("mine", 2, "10.0.0.1", A, is_trial=False), "", "REMOVED"),
        group(slot_name("gone", 0, "10.0.0.3", "c" * 56, is_trial=False), "", "PENDING"),
        group(slot_name("sweep-1", 0, "10.0.0.1", A, is_trial=True), A),
        group(slot_name("sweep-1", 1, "10.0.0.1", A, is_trial=True), "", "PENDING"),
        group("train of somebody", B),
        group("", "", "PENDING"),
        group("of Ray Tune", A) | {"bundles": {"0": {"node:10.0.0.1": 0.001}}},
    ]
    assert taken_by_others(groups, {A, B}) == [
        Taken("run mine", A, ONE, waits=False),
        Taken("run mine", B, ONE, waits=True),
        Taken("other programs", B, ONE, waits=False),
    ]
