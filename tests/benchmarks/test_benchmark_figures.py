"""The arithmetic between what a benchmark saw and what it prints."""

import json
import subprocess
import sys
import time
from pathlib import Path

import bare_loop
import pytest
from figures import Recovery, pace, phases_between, summary, table
from turns import Turn, take_turns

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def recovery(seconds: float, steps_lost: int = 0) -> Recovery:
    phases = {"detect": 0.1, "rest": seconds - 0.1}
    return Recovery(seconds, seconds, steps_lost, phases, rank=1, world_size=2, step_s=0.2)


def test_phases_fill_the_time_from_the_kill_to_the_last_mark() -> None:
    phases = phases_between({"detect": 10.5, "group": 12.0, "first step": 13.0}, begun=10.0)
    assert phases == {"detect": 0.5, "group": 1.5, "first step": 1.0}


def test_a_phase_that_ended_before_the_one_before_it_took_no_time_and_gives_none_away() -> None:
    # a process that Ray had kept ready was there before the old group was torn down
    phases = phases_between({"detect": 11.0, "processes": 4.0, "first step": 13.0}, begun=10.0)
    assert phases == {"detect": 1.0, "processes": 0.0, "first step": 2.0}


def test_the_summary_is_of_medians_and_keeps_every_run() -> None:
    found = summary([recovery(0.9), recovery(0.5, steps_lost=1), recovery(0.6)])
    assert (found["median_s"], found["min_s"], found["max_s"]) == (0.6, 0.5, 0.9)
    assert found["steps_lost"] == [0, 1, 0]
    assert [run["seconds"] for run in found["runs"]] == [0.9, 0.5, 0.6]
    assert found["median_phases_s"]["detect"] == 0.1


def test_pace_is_that_of_the_newest_steps() -> None:
    slow = [float(10 * step) for step in range(20)]
    fast = [slow[-1] + 0.5 * step for step in range(1, 21)]
    assert pace([*slow, *fast]) == 0.5


def test_a_turn_counts_whole_steps_only() -> None:
    turn = Turn(begun=10.0, ended=12.0, others=0.0)
    ends = [9.9, 10.1, 10.6, 11.1, 11.6, 12.3]
    assert turn.num_ended(ends) == 4
    assert turn.steps_per_s(ends) == pytest.approx(2.0)


def test_a_turn_too_short_for_a_step_says_so() -> None:
    with pytest.raises(RuntimeError, match="make it longer"):
        Turn(begun=10.0, ended=12.0, others=0.0).steps_per_s([9.0, 11.0, 13.0])


def test_one_of_two_jobs_computes_and_both_are_let_go_in_the_end() -> None:
    count = "import time\nwhile True:\n    print(time.time(), flush=True)\n    time.sleep(0.002)"
    jobs = [subprocess.Popen([sys.executable, "-c", count], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        for job in jobs:
            assert job.stdout is not None
            job.stdout.readline()
        turns = take_turns((lambda: [jobs[0].pid], lambda: [jobs[1].pid]), num_quiet=2, num_most=2, turn_s=0.6)
        last = max(turn.ended for pair in turns for turn in pair)
        printed = [_until(job, last) for job in jobs]
    finally:
        for job in jobs:
            job.kill()
            job.communicate()
    for pair in turns:
        for job, turn in enumerate(pair):
            # a signal takes a moment to arrive
            begun, ended = turn.begun + 0.2, turn.ended
            assert [at for at in printed[job] if begun < at < ended]
            assert not [at for at in printed[1 - job] if begun < at < ended]


def _until(job: subprocess.Popen[str], at: float) -> list[float]:
    assert job.stdout is not None
    printed = [float(job.stdout.readline())]
    while printed[-1] <= at:
        printed.append(float(job.stdout.readline()))
    assert printed[-1] <= time.time()
    return printed


def test_the_bare_loops_losses_are_put_together_in_the_order_of_the_micro_batches(tmp_path: Path) -> None:
    for rank, losses in enumerate(([0.1, 0.3], [0.2, 0.4])):
        told = [{"ended_at": 5.0 + rank, "losses": losses}]
        (tmp_path / f"rank-{rank}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in told) + '{"ended')
    assert bare_loop.read(tmp_path, 2) == bare_loop.Trained(ends={1: 6.0}, losses={1: pytest.approx(0.25)})


def test_tables_are_aligned() -> None:
    assert table(["who", "s"], [["elastictrain", "0.5"], ["peer", "12.0"]]).splitlines() == [
        "who              s",
        "elastictrain   0.5",
        "peer          12.0",
    ]


@pytest.mark.parametrize("script", ["recovery.py", "overhead.py"])
def test_a_wrong_argument_is_refused_before_anything_starts(script: str) -> None:
    refused = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), "--rusn", "3"], capture_output=True, text=True, check=False
    )
    assert refused.returncode == 2
    assert "--rusn" in refused.stderr
