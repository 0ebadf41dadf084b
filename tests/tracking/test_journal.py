"""The journal keeps what it was told: through a full disk, a torn line, an odd float."""

from __future__ import annotations

import json
import math
import resource
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from example_events import Story, full_story

from elastictrain.errors import DataError, InfrastructureError, RunConflictError
from elastictrain.events import Event, StepCommitted, Warned
from elastictrain.tracking.journal import Journal, JournalReader, Position, next_attempt, read_journal, tail


def write(folder: Path, events: list[Event], attempt: int = 1) -> Journal:
    journal = Journal(folder, attempt)
    for event in events:
        journal.append(event)
    return journal


@contextmanager
def disk_full_beyond(num_bytes: int) -> Iterator[None]:
    """No file of this process may grow beyond num_bytes: a write there is cut short, the next one refused."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_events_come_back_as_they_were(tmp_path: Path) -> None:
    events = full_story().events
    write(tmp_path, events[:100], attempt=1).close()
    write(tmp_path, events[100:], attempt=2).close()
    assert read_journal(tmp_path) == events
    assert next_attempt(tmp_path) == 3


def test_a_reader_reads_what_is_new_and_begins_anew_when_it_has_let_go(tmp_path: Path) -> None:
    events, reader = full_story().events, JournalReader(tmp_path)
    assert reader.events() == []
    write(tmp_path, events[:100], attempt=1).close()
    assert reader.events() == events[:100]
    write(tmp_path, events[100:], attempt=2).close()
    for _ in range(2):
        assert reader.events() == events
        reader.forget()


def test_each_line_is_there_at_once_without_closing(tmp_path: Path) -> None:
    events = Story().start().events
    write(tmp_path, events)
    assert read_journal(tmp_path) == events


@pytest.mark.parametrize("loss", [0.1 + 0.2, 1e-310, 2.0**-1074, math.pi * 1e300, math.inf, -math.inf, math.nan])
def test_a_loss_keeps_its_bits(tmp_path: Path, loss: float) -> None:
    write(tmp_path, Story().start().generation().steps(1, loss=loss).events).close()
    (step,) = (e for e in read_journal(tmp_path) if isinstance(e, StepCommitted))
    assert struct.pack("<d", step.loss) == struct.pack("<d", loss)


def test_the_lines_are_strict_json(tmp_path: Path) -> None:
    def refuse(constant: str) -> float:
        raise ValueError(constant)

    journal = write(tmp_path, Story().start().generation().steps(1, loss=math.nan).events)
    rows = [json.loads(line, parse_constant=refuse) for line in journal.path.read_text().splitlines()]
    assert rows[-1]["loss"] == "NaN"


def test_a_text_that_spells_a_float_stays_a_text(tmp_path: Path) -> None:
    events: list[Event] = [Warned(1.0, "Infinity", "NaN")]
    write(tmp_path, events).close()
    assert read_journal(tmp_path) == events


def test_a_torn_last_line_is_skipped_and_the_next_attempt_follows(tmp_path: Path) -> None:
    events = full_story().events
    torn = write(tmp_path, events[:10], attempt=1)
    torn.path.write_bytes(torn.path.read_bytes()[:-15])
    write(tmp_path, events[10:], attempt=2).close()
    assert read_journal(tmp_path) == events[:9] + events[10:]


def test_a_damaged_line_is_reported_with_its_place(tmp_path: Path) -> None:
    journal = write(tmp_path, Story().start().events)
    content = journal.path.read_bytes()
    journal.path.write_bytes(b"\x00\x00" + content[2:])
    with pytest.raises(DataError, match=r"attempt-0001\.jsonl is damaged at byte 0"):
        read_journal(tmp_path)


def test_unknown_events_of_a_newer_version_are_skipped(tmp_path: Path) -> None:
    journal = write(tmp_path, Story().start().events)
    with journal.path.open("a") as file:
        file.write('{"event": "CoffeeServed", "at": 1.0}\n')
    assert read_journal(tmp_path) == Story().start().events


def test_an_attempt_has_one_writer(tmp_path: Path) -> None:
    write(tmp_path, [])
    with pytest.raises(RunConflictError, match=r"another process .* run\.name"):
        Journal(tmp_path, 1)


def test_a_folder_that_is_not_writable_is_named(tmp_path: Path) -> None:
    (tmp_path / "journal").write_text("a file where the folder should be")
    with pytest.raises(InfrastructureError, match=r"can't write .*run\.storage"):
        Journal(tmp_path / "journal", 1)


def test_a_full_disk_stops_nothing_and_loses_nothing(tmp_path: Path) -> None:
    events = full_story().events
    journal = write(tmp_path, events[:5])
    with disk_full_beyond(journal.path.stat().st_size + 100):
        for event in events[5:50]:
            journal.append(event)
        assert "wait in memory" in journal.problem
        assert read_journal(tmp_path) == events[:5]
    journal.append(events[50])
    assert journal.problem == ""
    assert read_journal(tmp_path) == events[:51]


def test_the_mirror_gets_what_is_new_even_what_a_full_disk_refused(tmp_path: Path) -> None:
    remote: dict[str, bytes] = {}
    events = full_story().events
    journal = write(tmp_path, events[:5])
    journal.mirror(remote.__setitem__)
    with disk_full_beyond(journal.path.stat().st_size):
        journal.append(events[5])
        journal.mirror(remote.__setitem__)
    journal.flush()
    assert remote == {"journal/attempt-0001.jsonl": journal.path.read_bytes()}
    remote.clear()
    journal.mirror(remote.__setitem__)
    assert remote == {}, "nothing new, nothing sent"


def test_a_mirror_that_fails_is_tried_again(tmp_path: Path) -> None:
    def refuse(name: str, content: bytes) -> None:
        raise OSError("bucket is gone")

    journal = write(tmp_path, Story().start().events)
    with pytest.raises(OSError, match="bucket"):
        journal.mirror(refuse)
    remote: dict[str, bytes] = {}
    journal.mirror(remote.__setitem__)
    assert remote


def test_a_reader_follows_the_writer_over_attempts(tmp_path: Path) -> None:
    events = full_story().events
    seen: list[Event] = []
    first = write(tmp_path, events[:7])
    new, position = tail(tmp_path, Position(), limit=4)
    seen += new
    assert len(new) == 4
    for more, attempt in ((events[7:20], 1), (events[20:], 2)):
        if attempt == 1:
            for event in more:
                first.append(event)
        else:
            write(tmp_path, more, attempt)
        new, position = tail(tmp_path, position)
        seen += new
    assert seen == events
    assert tail(tmp_path, position) == ([], position)
