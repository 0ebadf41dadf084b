"""The games that control_plane.py plays end as they should, at sizes that take no time, or 25 s with processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import control_plane


def test_every_kind_of_decision_is_taken_and_timed() -> None:
    found = control_plane.measure(64)
    assert found["shrunk_to"] < 64  # the lost node took ranks along, and the newcomer brought them back
    assert {"a worker died", "a node is lost", "a node joined", "a node is drained"} <= set(found["calls"])
    assert all(call["worst_s"] > 0 for call in found["calls"].values())
    assert "bar 100 ms" in control_plane.told(found)


LIVE = "import control_live, json; print(json.dumps(control_live.measure(4, 2)))"


def test_no_message_a_rank_with_real_processes() -> None:
    """In a process of its own: it sets the environment of its cluster."""
    environment = {**os.environ, "RAY_AUTH_MODE": "token"}
    done = subprocess.run(
        [sys.executable, "-c", LIVE],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(control_plane.__file__).parent,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    acts = found["acts"]
    assert [act["ranks"] for act in acts.values()] == [4, 4, 2, 4]
    # where a node has several workers to tell something, its keeper is told; a pause is for rank 0 to announce
    assert acts["start"]["messages"]["to_workers"] == {}
    assert acts["a node comes"]["messages"]["to_workers"] == {"order": 1}
    assert acts["a worker is killed"]["known_s"] < acts["a worker is killed"]["total_s"]
    assert found["status"]["ranks"] == 4
    assert any(name.startswith("decision") for name in found["calls"])
