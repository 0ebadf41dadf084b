"""What people read while a run trains, on a terminal and in a file."""

import io
import math
import re
from dataclasses import replace

import pytest
from rich.console import Console

from elastictrain.events import (
    Cause,
    CheckpointFailed,
    CheckpointRejected,
    CheckpointRemoved,
    CheckpointWritten,
    DataReady,
    Evaluated,
    Event,
    FailureDetected,
    FaultInjected,
    GenerationStarted,
    Recovered,
    RunEnded,
    RunStarted,
    Skip,
    StepCommitted,
    Warned,
    WorkerStarted,
)
from elastictrain.progress import LiveTable, PlainLines, progress_on, status_table, worker_lines
from elastictrain.sentences import Narrator, status_line
from elastictrain.status import StandbyStatus, Status, WorkerStatus

LAYOUT = {"dp": 2, "zero_stage": 1, "micro_batch": 4, "accumulation": 2}
FAULT_AT = 1000.0

STATUS = Status(
    run="quickstart", status="running", attempt=1, step=61, steps=120, world_size=2, layout="dp2 zero1 4x2",
    generation=1, loss=4.12345, tokens_per_s=4512.3, goodput=0.9312, lost_steps=1, last_recovery_s=0.312, message="",
    workers=tuple(WorkerStatus(r, f"worker-{r}", 4710 + r, f"n{r}", "training", 61) for r in range(2)),
    standbys=(StandbyStatus("worker-3", 4713, "n0"),), nodes=(), driver_pid=1, updated_at=50.0,
)  # fmt: skip


def failure(cause: Cause, kind: str = "worker_lost", ranks: tuple[int, ...] = (1,)) -> FailureDetected:
    return FailureDetected(FAULT_AT, FAULT_AT + 0.012, 0, kind, ranks, "n2", 4711, cause, 61)


TOLD: list[tuple[Event, str]] = [
    (RunStarted(0, "demo", 1, {}, {}), "run demo starts"),
    (RunStarted(0, "demo", 3, {}, {}), "run demo goes on, attempt 3"),
    (DataReady(0, "u", "s", 23_110, 256, 6.12, False), "data prepared in 6.12 s: 23,110 samples, 256 held out"),
    (DataReady(0, "u", "s", 23_110, 256, 0.01, True), "data found unchanged in 10 ms: 23,110 samples, 256 held out"),
    (WorkerStarted(0, "worker-3", "n1", 4711, 4.2), "worker worker-3 (pid 4711, node n1) warm after 4.20 s"),
    (
        GenerationStarted(0, 1, LAYOUT, 2, 61, "worker_lost", "memory", "bit_exact", ()),
        "step 61  generation 1: 2 workers, dp2 zero1 4x2, state from memory",
    ),
    (
        GenerationStarted(0, 0, LAYOUT, 2, 1, "start", "fresh", "bit_exact", ()),
        "step 1  generation 0: 2 workers, dp2 zero1 4x2, state fresh",
    ),
    (FaultInjected(0, 0, 60, 1, "kill"), "step 60  planned fault: kill rank 1"),
    (
        failure(Cause("signal", "SIGKILL")),
        "step 61  rank 1 (pid 4711, node n2) killed by SIGKILL; detected in 12 ms",
    ),
    (
        failure(Cause("exit", "exit code 1")),
        "step 61  rank 1 (pid 4711, node n2) ended with exit code 1; detected in 12 ms",
    ),
    (
        failure(Cause("exception", "ValueError: bad"), "user_error"),
        "step 61  rank 1 (pid 4711, node n2) raised ValueError: bad; detected in 12 ms",
    ),
    (
        failure(Cause("oom", "out of memory")),
        "step 61  rank 1 (pid 4711, node n2) lost: out of memory; detected in 12 ms",
    ),
    (
        failure(Cause("oom", "OutOfMemoryError: 2 GiB"), "oom"),
        "step 61  rank 1 (pid 4711, node n2) ran out of memory: OutOfMemoryError: 2 GiB; detected in 12 ms",
    ),
    (
        failure(Cause("node_lost", "no heartbeat"), "node_lost", (1, 3)),
        "step 61  node n2 lost with ranks 1, 3; detected in 12 ms",
    ),
    (
        CheckpointWritten(0, 100, "u", 12_345_678, "aa", 0.12, 1, "", 4.0, LAYOUT),
        "step 100  checkpoint written in 0.12 s, 12.3 MB",
    ),
    (CheckpointFailed(0, 100, "No space left on device"), "step 100  checkpoint not written: No space left on device"),
    (
        CheckpointRejected(0, 50, "runs/x", "shard 0 is truncated"),
        "checkpoint of step 50 refused: shard 0 is truncated (runs/x)",
    ),
    (Warned(0, "mlflow", "does not answer"), "warning, mlflow: does not answer"),
    (
        Evaluated(0, 120, 3.1, 1.923, 2.034, 1000, "x"),
        "step 120  validation: 1.923 bits per byte (gzip -9: 2.034)",
    ),
    (RunEnded(0, "complete", 120), "step 120  run complete"),
    (
        RunEnded(0, "failed", 7, Cause("exception", "ValueError: bad", "Traceback")),
        "step 7  run failed: ValueError: bad",
    ),
    (RunEnded(0, "failed", 0, Cause("exception", "InfrastructureError: no cluster")), "step 0  run failed"),
]


@pytest.mark.parametrize(("event", "sentence"), TOLD)
def test_an_event_in_words(event: Event, sentence: str) -> None:
    assert Narrator().tell(event) == sentence


def test_committed_steps_and_removed_checkpoints_are_not_news() -> None:
    step = StepCommitted(1, 0, 1, 2.0, "", 16, 2048, 0, 1, 1e-3, 1, 0, 0)
    assert Narrator().tell(step) is None
    skipped = replace(step, step=12, loss=math.nan, skipped=Skip("loss", None, 12))
    assert Narrator().tell(skipped) == "step 12  skipped: loss nan"
    spike = replace(step, step=12, loss=9.31, skipped=Skip("spike", 3.2, 11))
    assert Narrator().tell(spike) == "step 12  skipped: loss 9.31 above 3.2; back to the state after step 10"
    assert Narrator().tell(CheckpointRemoved(0, 50, "u")) is None


def test_a_recovery_counts_from_the_first_fault_behind_it() -> None:
    narrator = Narrator()
    narrator.tell(failure(Cause("signal", "SIGKILL")))
    narrator.tell(replace(failure(Cause("signal", "SIGKILL")), at=FAULT_AT + 0.2))
    first = narrator.tell(Recovered(FAULT_AT + 0.31, 1, 61, 1, "memory", "bit_exact"))
    assert first == "step 61  recovered in 0.31 s from memory, 1 step lost, bit_exact"
    narrator.tell(replace(failure(Cause("signal", "SIGKILL")), at=FAULT_AT + 10))
    second = narrator.tell(Recovered(FAULT_AT + 10.5, 2, 70, 0, "durable", "order_exact"))
    assert second == "step 70  recovered in 0.50 s from a checkpoint, 0 steps lost, order_exact"


def test_the_state_in_a_line() -> None:
    assert status_line(STATUS) == (
        "step 61/120  running  loss 4.1235  4,512 tokens/s  2 workers (dp2 zero1 4x2)  goodput 93.1 %  "
        "1 step lost  recovery 0.31 s"
    )
    starting = replace(
        STATUS,
        status="preparing",
        step=0,
        world_size=0,
        loss=None,
        tokens_per_s=0.0,
        last_recovery_s=None,
        message="reading the corpus",
    )
    assert status_line(starting) == "step 0/120  preparing  goodput 93.1 %  reading the corpus"


def test_lines_come_at_changes_and_every_few_seconds() -> None:
    stream = io.StringIO()
    lines = PlainLines(stream, every_s=5)
    for step in range(100):
        lines.on_status(replace(STATUS, step=step, updated_at=100 + step * 0.1))
    lines.on_status(replace(STATUS, step=100, status="recovering", updated_at=110))
    lines.close()
    steps = [int(line.split("/")[0].removeprefix("step ")) for line in stream.getvalue().splitlines()]
    assert steps == [0, 50, 100]


def test_a_message_that_stays_is_told_once() -> None:
    stream = io.StringIO()
    lines = PlainLines(stream, every_s=5)
    for number in range(3):
        lines.on_status(replace(STATUS, step=60 + number, updated_at=10.0 * number, message="no room"))
    assert [line.endswith("no room") for line in stream.getvalue().splitlines()] == [True, False, False]


def test_goodput_alone_is_no_news_and_a_warning_is_told_once() -> None:
    stream = io.StringIO()
    lines = PlainLines(stream, every_s=5)
    lines.on_event(Warned(0, "storage", "no room on the disk"))
    for number in range(3):
        lines.on_status(
            replace(
                STATUS,
                status="starting",
                goodput=0.5 - number / 10,
                updated_at=10.0 * number,
                message="no room on the disk",
            )
        )
    warning, status = stream.getvalue().splitlines()
    assert warning == "warning, storage: no room on the disk"
    assert "starting" in status
    assert "no room" not in status


def test_a_pipe_gets_plain_lines_at_once() -> None:
    stream = io.TextIOWrapper(raw := io.BytesIO(), write_through=False)
    listener = progress_on(stream)
    listener.on_event(Warned(0, "mlflow", "does not [bold]answer[/bold]"))
    assert raw.getvalue() == b"warning, mlflow: does not [bold]answer[/bold]\n"
    listener.on_status(STATUS)
    listener.close()
    assert b"\x1b" not in raw.getvalue()


def test_a_reader_that_went_away_does_not_stop_training() -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    lines = PlainLines(Closed())
    lines.on_event(Warned(0, "a", "b"))
    lines.on_status(STATUS)
    lines.close()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_table_and_its_cursor_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    terminal = Terminal()
    listener = progress_on(terminal)
    assert isinstance(listener, LiveTable)
    listener.on_event(failure(Cause("signal", "SIGKILL")))
    listener.on_status(STATUS)
    listener.close()
    listener.close()
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    assert "killed by SIGKILL" in shown
    assert "step 61/120" in shown
    assert terminal.getvalue().rindex("\x1b[?25h") > terminal.getvalue().rindex("\x1b[?25l")


def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal()
    listener = progress_on(terminal)
    listener.on_status(STATUS)
    listener.close()
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", terminal.getvalue())


def test_a_terminal_that_can_not_redraw_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(progress_on(Terminal()), PlainLines)


def drawn(status: Status | None, recent: tuple[str, ...] = ()) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(status_table(status, recent))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]  # it is a StringIO


def test_the_table_shows_what_the_state_holds() -> None:
    shown = drawn(STATUS, ("step 61  [rank 1] killed",))
    for part in ("61/120", "running", "4.1235", "4,512", "dp2 zero1 4x2", "93.1 %", "0.31 s", "[rank 1] killed"):
        assert part in shown
    assert "quickstart" in shown
    assert "pid 4711" in shown


def test_the_table_begins_with_events_alone() -> None:
    assert "run demo starts" in drawn(None, ("run demo starts",))


def test_a_big_world_is_counted_rather_than_listed() -> None:
    workers = tuple(WorkerStatus(r, f"w{r}", r, "n", "training", 1) for r in range(500))
    lines = worker_lines(replace(STATUS, workers=workers))
    assert len(lines) == 9
    assert lines[-1] == "and 493 more workers"
