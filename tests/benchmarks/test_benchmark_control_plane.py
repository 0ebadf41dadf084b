"""The game that control_plane.py plays ends as it should, at a size that takes no time."""

from __future__ import annotations

import control_plane


def test_every_kind_of_decision_is_taken_and_timed() -> None:
    found = control_plane.measure(64)
    assert found["shrunk_to"] < 64  # the lost node took ranks along, and the newcomer brought them back
    assert {"a worker died", "a node is lost", "a node joined", "a node is drained"} <= set(found["calls"])
    assert all(call["worst_s"] > 0 for call in found["calls"].values())
    assert "bar 100 ms" in control_plane.told(found)
