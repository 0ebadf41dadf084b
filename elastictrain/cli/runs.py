"""The runs that a storage holds, for the commands that look at them.

A run is a folder with a journal. Whether a process works on it shows in the lock that its driver holds for as long as
it lives (flock on `<run>/lock`); on an object store there is no lock, and the run's own word has to do.
"""

from __future__ import annotations

import difflib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from elastictrain.errors import ConfigError, DataError, InfrastructureError
from elastictrain.status import Status

if TYPE_CHECKING:
    from elastictrain.events import Event
    from elastictrain.storage import Storage
    from elastictrain.tracking.event_log import EventLog


@dataclass(frozen=True)
class StoredRun:
    """One run, read only."""

    name: str
    storage: Storage
    """Of the run's own folder."""

    def status(self) -> Status | None:
        """The live state, `interrupted` where the driver went without a word; None before the first was written."""
        try:
            text = self.storage.read("status.json")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise InfrastructureError(f"can't read {self.storage.uri}/status.json: {error.strerror or error}") from None
        try:
            status = Status.from_json(json.loads(text))
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{self.storage.uri}/status.json is damaged: {error}. The run's next start replaces it."
            ) from None
        if status.ended:
            return status
        if not self.driven(status):
            return status.interrupted()
        return status.taken_over() if self._has_another_driver(status) else status

    def driven(self, status: Status | None) -> bool:
        """Whether a process works on the run now."""
        if self.storage.local is None:
            return status is not None and not status.ended
        from elastictrain.runtime.home import is_driven

        return is_driven(self.storage.local)

    def _has_another_driver(self, status: Status) -> bool:
        if self.storage.local is None:
            return False
        from elastictrain.runtime.home import driver_of

        return driver_of(self.storage.local) not in (None, status.driver_pid)

    def events(self) -> EventLog:
        """The whole journal."""
        from elastictrain.tracking.event_log import EventLog

        return EventLog(self.history())

    def history(self) -> Iterator[Event]:
        """The whole journal, one event at a time."""
        from elastictrain.tracking.journal import history

        if self.storage.local is not None:
            yield from history(self.storage.local)
            return
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder, "journal")
            copy.mkdir()
            for name in self.storage.list("journal"):
                (copy / name).write_bytes(self.storage.read(f"journal/{name}"))
            yield from history(Path(folder))

    @property
    def delivered(self) -> bool:
        """Whether MLflow has taken the whole journal, as far as can be known here."""
        from elastictrain.tracking.deliver import is_delivered

        return self.storage.local is not None and is_delivered(self.storage.local)

    def recorded_checkpoints(self) -> dict[int, str]:
        """SHA-256 of the manifest of each checkpoint that the journal knows, by step."""
        from elastictrain.events import CheckpointWritten

        return {event.step: event.sha256 for event in self.events() if isinstance(event, CheckpointWritten)}


def find_run(storage_uri: str, name: str) -> StoredRun:
    """The run of this name; raises ConfigError with the near names and the place."""
    storage, names = _runs(storage_uri)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3)
        hint = f"Did you mean {' or '.join(near)}?" if near else f"There is {', '.join(names)}."
        raise ConfigError(f"there is no run {name!r} in {storage.uri}. {hint} --storage names another place.")
    return StoredRun(name, storage.run(name))


def all_runs(storage_uri: str) -> list[StoredRun]:
    """Every run of the storage; raises ConfigError where there is none."""
    storage, names = _runs(storage_uri)
    return [StoredRun(name, storage.run(name)) for name in names]


def newest_run(storage_uri: str) -> StoredRun:
    """The run whose state changed last."""
    return max(all_runs(storage_uri), key=_changed_at)


def _runs(storage_uri: str) -> tuple[Storage, list[str]]:
    from elastictrain.storage import Storage

    storage = Storage.open(storage_uri)
    try:
        names = [name for name in storage.list() if storage.exists(f"{name}/journal")]
    except OSError as error:
        raise InfrastructureError(f"can't read the storage {storage.uri}: {error.strerror or error}") from None
    if not names:
        raise ConfigError(
            f"there is no run in {storage.uri}: `elastictrain train` begins one, --storage names another place"
        )
    return storage, names


def _changed_at(run: StoredRun) -> float:
    status = run.status()
    return status.updated_at if status else 0.0
