"""The journal: all truth about a run, as JSON lines that are only ever appended.

Each attempt at a run writes one file, `<run folder>/journal/attempt-0001.jsonl`, one event a line; the attempt's
supervisor is its only writer. A line is handed to the operating system at once (some 20 us), so a killed process loses
none; what a full disk refuses waits in memory for the next append. Readers skip a last line that has no newline: its
writer was cut off, or is still at it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from elastictrain.errors import DataError, InfrastructureError, RunConflictError
from elastictrain.events import Event, decode, encode
from elastictrain.tracking.event_log import EventLog
from elastictrain.tracking.exact_json import dumps

_FILE = re.compile(r"attempt-(\d{4,})\.jsonl")


@dataclass(frozen=True, slots=True, order=True)
class Position:
    """How far a reader has come: bytes of an attempt's file. Later positions are greater."""

    attempt: int = 0
    offset: int = 0


class Journal:
    """The writer of one attempt's file. Not thread-safe: one loop writes."""

    def __init__(self, folder: Path, attempt: int) -> None:
        """Create the file in the run's folder; raises RunConflictError when the attempt has been journalled before."""
        self.path = folder / "journal" / f"attempt-{attempt:04d}.jsonl"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except FileExistsError:
            raise RunConflictError(
                f"attempt {attempt} has a journal already, {self.path}: another process is running this run, or "
                f"began to. Wait for it to end, or take another run.name."
            ) from None
        except OSError as error:
            raise InfrastructureError(
                f"can't write the journal {self.path}: {error.strerror}. Free space there, or set run.storage to a "
                f"folder that is writable."
            ) from error
        self._pending = b""
        self.unwritten: list[Event] = []
        """Events that are in memory only, whole or in part."""
        self._mirrored = -1
        self.problem = ""
        """Why the newest lines are in memory only; empty when all are written."""

    def append(self, event: Event) -> None:
        """Write the event, and whatever an earlier append could not; never raises for a disk that is full or gone."""
        self._pending += dumps(encode(event)).encode() + b"\n"
        self.unwritten.append(event)
        self.flush()

    def flush(self) -> bool:
        """Try to write what waits in memory; whether nothing waits any more."""
        try:
            while self._pending:
                self._pending = self._pending[os.write(self._file, self._pending) :]
        except OSError as error:
            self.problem = f"can't write {self.path}: {error.strerror}; {len(self._pending)} bytes wait in memory"
            return False
        self.problem = ""
        self.unwritten.clear()
        return True

    def mirror(self, storage_write: Callable[[str, bytes], None]) -> None:
        """Copy the journal to remote storage, under its path relative to the run's folder, if it has grown.

        Object stores can't append, so each call sends the whole file: call it every few seconds, not every step.
        What storage_write raises is passed on, and the next call tries again.
        """
        content = self.path.read_bytes() + self._pending
        if len(content) != self._mirrored:
            storage_write(f"journal/{self.path.name}", content)
            self._mirrored = len(content)

    def close(self) -> None:
        """Write what waits, make it durable, and let go of the file."""
        if self.flush():
            os.fsync(self._file)
        os.close(self._file)


class JournalReader:
    """All events of a run, whoever writes them; asked again it reads only what is new."""

    def __init__(self, run_folder: Path) -> None:
        self._folder = run_folder
        self._events = EventLog()
        self._position = Position()

    def events(self) -> EventLog:
        """What is there now, of all attempts, in order; the log is the reader's own and grows."""
        for event, position in follow(self._folder, self._position):
            self._events.append(event)
            self._position = position
        return self._events

    def forget(self) -> None:
        """Hold nothing any more: a month's events take hundreds of megabytes. The next call begins anew."""
        self._events, self._position = EventLog(), Position()


def journal_files(run_folder: Path) -> dict[int, Path]:
    """The attempts' files by attempt, ascending; empty for a run that never began."""
    found = {}
    for path in (run_folder / "journal").glob("attempt-*.jsonl"):
        if match := _FILE.fullmatch(path.name):
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def next_attempt(run_folder: Path) -> int:
    """The number of the attempt that begins now: 1 for a new run."""
    return max(journal_files(run_folder), default=0) + 1


def read_journal(run_folder: Path) -> EventLog:
    """All events of all attempts, in order. About 20 us an event, and 160 bytes a step."""
    return EventLog(history(run_folder))


def history(run_folder: Path, until: Position | None = None) -> Iterator[Event]:
    """The events of all attempts, in order, one at a time; those up to this position, if there is one."""
    for event, position in follow(run_folder, Position()):
        if until is not None and position > until:
            return
        yield event


def tail(run_folder: Path, position: Position, limit: int | None = None) -> tuple[list[Event], Position]:
    """The events after this position, at most `limit` of them, and the position after those."""
    events = []
    for event, after in islice(follow(run_folder, position), limit):
        events.append(event)
        position = after
    return events, position


def follow(run_folder: Path, position: Position) -> Iterator[tuple[Event, Position]]:
    """Each whole event after this position that is there now, with the position after it."""
    for attempt, path in journal_files(run_folder).items():
        if attempt < position.attempt:
            continue
        offset = position.offset if attempt == position.attempt else 0
        with path.open("rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                event = _event(line, path, offset)
                offset += len(line)
                if event is not None:
                    yield event, Position(attempt, offset)


def _event(line: bytes, path: Path, offset: int) -> Event | None:
    try:
        return decode(json.loads(line))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path} is damaged at byte {offset}: {error}. Restore the file from a copy, or cut it off there to give "
            f"up what follows."
        ) from error
