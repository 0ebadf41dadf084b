"""A run's own folder: the lock that makes its driver the only one, the config it began with, its live state.

For a storage that is no folder (s3://, gs://) the journal is kept in a folder of this machine and copied to the
storage every few seconds; a run that is resumed on another machine fetches it from there first.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

from elastictrain.config import TrainConfig, blocking_changes
from elastictrain.errors import ConfigError, RunConflictError
from elastictrain.runtime.job_folder import in_job_folder
from elastictrain.status import Status
from elastictrain.storage import Storage
from elastictrain.tracking.journal import journal_files
from elastictrain.tracking.redact import redact_all
from elastictrain.workloads.named import absolute

MIRROR_EVERY_S = 5.0
DATA_FOLDER = "_data"
"""Of token shards, in the storage: no run's name begins with an underscore."""
CONFIG = "config.json"
"""Of the run's folder: what it began with."""
_STATUS = "status.json"


def settled(config: TrainConfig) -> TrainConfig:
    """The config with an absolute run.storage and absolute files of the user's code, the same for every process.

    A submitted job runs in a passing copy of the user's folder: there, a relative storage is taken to be under
    ~/.elastictrain, so that the next submission finds the run; and files are left relative, to be found in the copy.
    """
    in_job = in_job_folder()
    storage = config.run.storage
    if "://" not in storage:
        root = Path.home() / ".elastictrain" if in_job else Path.cwd()
        path = str((root / Path(storage).expanduser()).resolve())
        config = config.model_copy(update={"run": config.run.model_copy(update={"storage": path})})
    if not in_job:
        model = config.model.model_copy(update={"workload": absolute(config.model.workload)})
        data = config.data.model_copy(update={"samples": absolute(config.data.samples)})
        config = config.model_copy(update={"model": model, "data": data})
    return config


def local_root(storage: Storage) -> Path:
    """Where on this machine is kept what all runs of a storage share."""
    spool = Path.home() / ".elastictrain" / "spool" / sha256(storage.uri.encode()).hexdigest()[:16]
    return storage.local or spool


class RunHome:
    """The folder of one run on the driver's machine."""

    def __init__(self, config: TrainConfig) -> None:
        storage = Storage.open(config.run.storage)
        storage.check_writable()
        self.storage = storage.run(config.run.name)
        self.root = local_root(storage)
        """Holds the token shards and, unless told otherwise, the MLflow store."""
        self.data = self.root / DATA_FOLDER
        self.folder = self.root / config.run.name
        self._remote = storage.local is None
        self._config = config
        self._mirrored = 0.0
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._remote:
            self._fetch()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run until the block or the process ends; raises RunConflictError when another process has it."""
        path = self.folder / "lock"
        while True:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a+") as file:
                try:
                    _lock(file)
                except BlockingIOError:
                    file.seek(0)
                    holder = file.read().strip() or "unknown"
                    raise RunConflictError(
                        f"run {self._config.run.name!r} is being trained now by process {holder} ({self.folder}). "
                        f"Wait for it, stop it, or choose another run.name."
                    ) from None
                if not _is_at(file, path):
                    continue  # who held it has removed it: see `forget`
                file.truncate(0)
                file.write(f"{os.getpid()} on {os.uname().nodename}")
                file.flush()
                yield
                return

    def check_config(self, begun: bool) -> None:
        """Remember the config; raises RunConflictError when it can't continue a run that has trained (`begun`)."""
        path = self.folder / CONFIG
        if begun and path.exists():
            refuse_other_config(self._config, path.read_bytes(), self.storage.uri)
            return
        self.storage.write_atomic(CONFIG, json.dumps(_told(self._config).to_dict(), indent=1).encode())
        if self._remote:
            self._fetch()

    def write_status(self, status: Status) -> None:
        """Replace status.json; a disk that is full shows elsewhere, and must not stop training here."""
        path = self.folder / f".{_STATUS}.{os.getpid()}"
        try:
            path.write_text(json.dumps(status.to_json()))
            path.replace(self.folder / _STATUS)
        except OSError:
            path.unlink(missing_ok=True)

    def status(self) -> bytes | None:
        """What status.json holds now; None before there is one."""
        path = self.folder / _STATUS
        return path.read_bytes() if path.exists() else None

    def forget(self, journal: Path | None, status: bytes | None) -> None:
        """Undo an attempt that never had a cluster. Of a new run nothing is left; `status` is what an older one said.

        Only under the lock, and with nothing mirrored yet. `journal` is None for an attempt that told nothing.
        """
        if journal is not None:
            journal.unlink()
        if journal_files(self.folder):
            if status is not None:
                (self.folder / _STATUS).write_bytes(status)
            return
        for name in (_STATUS, CONFIG, "lock"):
            (self.folder / name).unlink(missing_ok=True)
        with suppress(OSError):  # what else is there is not ours
            (self.folder / "journal").rmdir()
        with suppress(OSError):
            self.folder.rmdir()

    def mirror(self, journal: Any, force: bool = False) -> str:
        """Copy journal and live state to a remote storage when it is time; returns the problem, if there is one."""
        if not self._remote or (not force and time.monotonic() < self._mirrored + MIRROR_EVERY_S):
            return ""
        self._mirrored = time.monotonic()
        try:
            journal.mirror(self.storage.write_atomic)
            status = self.folder / _STATUS
            if status.exists():
                self.storage.write_atomic(_STATUS, status.read_bytes())
        except OSError as error:
            return f"can't copy the journal to {self.storage.uri}: {error}; it is safe in {self.folder}"
        return ""

    def _fetch(self) -> None:
        names = [CONFIG, *(f"journal/{name}" for name in self.storage.list("journal"))]
        for name in names:
            target = self.folder / name
            if self.storage.exists(name) and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(self.storage.read(name))


def refuse_other_config(config: TrainConfig, begun_with: bytes, place: str) -> None:
    """Raise RunConflictError when this config can't continue the run at `place`, which has this config.json."""
    try:
        old = TrainConfig.from_dict(json.loads(begun_with), f"{place}/{CONFIG}")
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place}/{CONFIG} is damaged: {error}. Remove the folder to begin the run anew.") from None
    changes = blocking_changes(_told(old), _told(config))
    if changes:
        told = "; ".join(f"{key} was {old!r} and is now {new!r}" for key, old, new in changes)
        raise RunConflictError(
            f"run {config.run.name!r} in {place} can't go on with this config: {told}. Put the old value back, or "
            f"choose another run.name to begin a new run."
        )


def refuse_fewer_steps(config: TrainConfig, done: int) -> None:
    """Raise RunConflictError when the run has done more steps than this config asks for."""
    if done > config.train.steps:
        raise RunConflictError(
            f"train.steps {config.train.steps} is less than the {done} steps that the run has done. Set train.steps to "
            f"{done} or more, or choose another run.name."
        )


def is_driven(run_folder: Path) -> bool:
    """Whether a process works on the run in this folder now."""
    try:
        with (run_folder / "lock").open("rb") as lock:
            # shared: other readers may ask too; let go at once: no driver can start in those microseconds
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def driver_of(run_folder: Path) -> int | None:
    """Process that works on the run in this folder, as it has written into its lock; None where it has not."""
    try:
        pid, _, _ = (run_folder / "lock").read_text().partition(" ")
        return int(pid)
    except (FileNotFoundError, ValueError):
        return None


def _told(config: TrainConfig) -> TrainConfig:
    """The config as it is written down: without the passwords in its URIs."""
    return TrainConfig.from_dict(redact_all(config.to_dict()))


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _lock(file: IO[str]) -> None:
    """Lock exclusively; commands that only look hold it shared for microseconds, so one refusal proves nothing."""
    for attempt in range(10):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if attempt == 9:
                raise
            time.sleep(0.02)
