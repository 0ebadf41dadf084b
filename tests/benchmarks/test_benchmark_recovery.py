"""What the recovery benchmark makes of a peer's notes and of a journal's times, and that nothing of a trial stays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import strike_peer
from figures import Recovery, Stall, Unrecovered, stalls_of, summary, summary_of_stalls
from peers import chosen
from peers.agents import Agents
from peers.notes import Note, Setup, read_notes, teller
from told import told
from trial import MARK, Trial, processes_of

MACHINE = {"cores": 2, "cpu": "a processor", "load_before": 0.1, "python": "3", "elastictrain": "1", "torch": "2"}
MACHINE |= {"deepspeed": "0", "ray": "2"}


def notes_of(pids: list[int], steps: range, at: float, **more: Any) -> list[Note]:
    """A group that notes a step a second."""
    return [
        {"event": "step", "at": at + number, "pid": pid, "rank": rank, "world_size": len(pids), "step": step, **more}
        for number, step in enumerate(steps)
        for rank, pid in enumerate(pids)
    ]


def test_a_peer_is_back_when_each_rank_of_a_new_group_has_done_a_step() -> None:
    old = notes_of([11, 12], range(1, 25), at=100.0)
    groups = {strike_peer._group(note) for note in old}
    new = [
        {"event": event, "at": 130.0 + number, "pid": pid, "rank": rank, "world_size": 2, "step": 20, "born": 129.0}
        for number, event in enumerate(("loop", "imported", "engine", "restored"))
        for rank, pid in enumerate([21, 22])
    ]
    first = notes_of([21, 22], range(21, 22), at=140.0, born=129.0)
    assert not strike_peer._back([*old, *new, *first[:1]], groups, None)
    notes = [*old, *new, *first]
    assert strike_peer._back(notes, groups, None)
    found = strike_peer._recovery(
        notes, strike_peer._first_steps(notes, groups), begun=123.5, marks={}, torn_down_at=125.0, rank=1
    )
    assert found.seconds == 16.5
    assert found.pause_s == 17.0
    assert found.steps_lost == 4
    assert found.world_size == 2
    assert found.step_s == 1.0
    assert found.phases_s == {
        "detect, tear down": 1.5,
        "processes": 4.0,
        "imports, group": 1.0,
        "import engine": 1.0,
        "engine": 1.0,
        "restore": 1.0,
        "first step": 7.0,
    }
    assert sum(found.phases_s.values()) == found.seconds


def test_survivors_that_keep_their_process_are_a_new_group_by_its_name() -> None:
    old = notes_of([11, 12], range(1, 10), at=100.0, group=4)
    groups = {strike_peer._group(note) for note in old}
    late = notes_of([11, 12], range(10, 11), at=109.5, group=4)[:1]
    assert not strike_peer._back([*old, *late], groups, None)
    new = notes_of([11], range(11, 12), at=116.0, group=5)
    assert strike_peer._back([*old, *late, *new], groups, None)
    found = strike_peer._recovery([*old, *late, *new], new, 109.0, {}, None, rank=1)
    assert (found.seconds, found.steps_lost, found.world_size) == (7.0, 0, 1)
    assert found.phases_s == {"first step": 7.0}


def test_a_job_that_was_to_grow_is_back_at_the_new_size_only() -> None:
    old = notes_of([11], range(1, 10), at=100.0)
    groups = {strike_peer._group(note) for note in old}
    again = notes_of([21], range(5, 7), at=120.0)
    assert not strike_peer._back([*old, *again], groups, world_size=2)
    grown = notes_of([31, 32], range(5, 6), at=130.0)
    assert strike_peer._back([*old, *grown], groups, world_size=2)


def test_a_step_in_which_one_that_comes_only_copies_is_none_of_the_larger_group() -> None:
    old = notes_of([11], range(1, 10), at=100.0, group=1)
    groups = {strike_peer._group(note) for note in old}
    healing = [{**note, "world_size": 1} for note in notes_of([11, 21], range(10, 11), at=110.0, group=2)]
    assert not strike_peer._back([*old, *healing], groups, world_size=2)
    notes = [*old, *healing, *notes_of([11, 21], range(11, 12), at=110.5, group=2)]
    assert strike_peer._back(notes, groups, world_size=2)
    found = strike_peer._recovery(notes, strike_peer._first_steps(notes, groups, 2), 107.0, {}, None, rank=0)
    assert (found.seconds, found.pause_s, found.steps_lost, found.world_size) == (3.5, 0.5, 0, 2)


def test_medians_are_of_the_runs_that_recovered() -> None:
    recovered = Recovery(0.5, 0.6, 0, {"detect": 0.5}, rank=1, world_size=1, step_s=0.2)
    found = summary([recovered, Unrecovered(90.0, "its state is of 2 ranks")])
    assert (found["recovered"], found["of"]) == (1, 2)
    assert found["median_s"] == 0.5
    assert "median_s" not in summary([Unrecovered(90.0, "no")])
    assert found["runs"][1] == {"waited_s": 90.0, "problem": "its state is of 2 ranks"}


def test_a_checkpoint_costs_what_the_steps_beside_it_took_longer() -> None:
    slow = dict.fromkeys(range(21, 31), 2.0)  # the machine is slower from here on
    took = dict.fromkeys(range(1, 21), 1.0) | slow | {11: 1.5, 12: 1.2, 21: 2.5, 22: 2.2}
    ends, at = {}, 0.0
    for step, seconds in took.items():
        at += seconds
        ends[step] = at
    waits_s = dict.fromkeys(took, 0.0) | {11: 0.25}
    written = {10: (ends[11] - 0.1, 1.3), 20: (ends[21] - 0.1, 1.3), 30: (at + 1.0, 1.3)}
    stalls = stalls_of(ends, waits_s, written)
    assert [stall.stalled_s for stall in stalls] == pytest.approx([0.7, 0.7])
    assert [stall.waited_s for stall in stalls] == [0.25, 0.0]
    assert [stall.write_s for stall in stalls] == [1.3, 1.3]


def test_the_table_has_a_row_for_each_peer_and_says_who_never_came_back() -> None:
    ours = Recovery(0.5, 0.6, 0, {"detect": 0.1, "first step": 0.4}, rank=1, world_size=1, step_s=0.2)
    theirs = Recovery(50.0, 51.0, 7, {}, rank=1, world_size=1, step_s=0.2)
    never = Unrecovered(180.0, "AssertionError: no")
    node = {
        "case": "node",
        "zero_stage": 1,
        "elastictrain": summary([ours]),
        "peers": {
            "zero": {"title": "Zero", **summary([never])},
            "ddp": {"title": "Ddp", **summary([theirs, theirs, never])},
        },
    }
    checkpoint = {
        "case": "checkpoint",
        "zero_stage": 1,
        "num_bytes": 2_000_000,
        "elastictrain": summary_of_stalls([Stall(0.02, 0.0, 1.0)]),
        "peers": {"zero": {"title": "Zero", **summary_of_stalls([Stall(1.0, 1.0, 1.0)])}},
    }
    text = told({"machine": MACHINE, "job": "a.yaml", "cases": [node, checkpoint]})
    rows = [[cell for cell in line.split("  ") if cell] for line in text.splitlines()[3:9]]
    assert "a.yaml" in text.splitlines()[1]
    assert [cell.strip() for cell in rows[1]] == [
        "node lost, ZeRO 1: first new step",
        "0.50",
        "Zero",
        "never",
        "-",
        "0",
        "-",
    ]
    assert [cell.strip() for cell in rows[2]][2:] == ["Ddp", "50.00 (2 of 3)", "100.0", "0", "7 7"]
    assert [cell.strip() for cell in rows[3]][4] == "2.0%"
    assert [cell.strip() for cell in rows[4]][:5] == [
        "checkpoint, ZeRO 1: ranks waited",
        "0.00",
        "Zero",
        "1.00",
        "0.0%",
    ]
    assert "not back after 180 s; AssertionError: no" in text
    json.dumps([node, checkpoint])


def test_peers_are_named_and_a_wrong_name_is_told() -> None:
    assert chosen.names("none") == []
    assert chosen.names("torchrun,ray_train") == ["torchrun", "ray_train"]
    with pytest.raises(ValueError, match="torchrum"):
        chosen.names("torchrum")
    keys = [peer.key for peer in chosen.for_case("node", ["ray_train", "torchrun"])]
    assert keys == ["ray_train", "ray_train_ddp", "torchrun"]
    assert [p.key for p in chosen.for_case("worker", ["ray_train", "torchrun"], sharded_only=True)] == ["ray_train"]
    assert [p.key for p in chosen.for_case("checkpoint", ["ray_train", "torchrun"])] == ["ray_train"]


def test_what_a_trial_leaves_behind_is_ended_with_it(tmp_path: Path) -> None:
    with processes_of(tmp_path):
        # its parent ends at once: nobody's child any more
        orphan = subprocess.run(["sh", "-c", "sleep 600 >/dev/null 2>&1 & echo $!"], capture_output=True, text=True)
        pid = int(orphan.stdout)
        assert psutil.Process(pid).environ()[MARK] == str(tmp_path)
    end = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end
    assert MARK not in os.environ


class _Sleepers(Agents):
    """Agents with a child each, which notes a step and then sleeps."""

    def command(self, number: int) -> list[str]:
        benchmarks = str(Path(strike_peer.__file__).parent)
        rank = (
            f"import sys, time; sys.path.insert(0, {benchmarks!r}); from peers.notes import teller; "
            f"teller({self.described!r}, {number}, 2)('step', 1); time.sleep(600)"
        )
        return ["sh", "-c", f'{sys.executable} -c "{rank}"; true']


def test_a_node_that_is_an_agent_dies_with_its_rank_and_the_head_is_known(tmp_path: Path) -> None:
    events = tmp_path / "notes.jsonl"
    job = _Sleepers(tmp_path, str(events))
    with processes_of(tmp_path):
        try:
            job.add_node()
            job.add_node()
            end = time.monotonic() + 30
            while len(read_notes(events)) < 2:
                assert time.monotonic() < end
            pids = {note["rank"]: note["pid"] for note in read_notes(events)}
            assert job.on_head(pids[0])
            assert not job.on_head(pids[1])
            exit_of = strike_peer._Exit(pids[1])
            job.kill_node_of(pids[1])
            while exit_of.at is None:
                exit_of.look()
                assert time.monotonic() < end
            assert job.jobs[1].process.wait(10) == -9
            job.require_running()
        finally:
            job.close()
        with pytest.raises(RuntimeError, match="all agents ended"):
            job.require_running()


def test_a_setup_goes_through_a_file(tmp_path: Path) -> None:
    setup = Setup("job", "ddp", {"train": {"steps": 1}}, "data", "storage", 10, str(tmp_path / "notes"))
    assert Setup.read(strike_peer.described(setup, tmp_path)) == setup
    teller(setup.events, rank=1, world_size=2)("step", 3)
    [found] = read_notes(Path(setup.events))
    assert (found["rank"], found["world_size"], found["step"], found["pid"]) == (1, 2, 3, os.getpid())


def test_a_job_that_gets_a_node_begins_on_one() -> None:
    joined = Trial("name", "join", 1, 0, 0, 0.0, 10, 60.0)
    assert (joined.num_nodes, joined.num_ranks) == (1, 1)
    lost = Trial("name", "node", 1, 0, 0, 0.0, 10, 60.0, spare_nodes=1)
    assert (lost.num_nodes, lost.num_ranks) == (3, 2)
