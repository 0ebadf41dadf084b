"""The embedded MLflow store: one SQLite file, set up whole or not at all, and asked first whether it is free.

Setting up costs 1.5 to 4 s, once; asking costs a millisecond, or a second when the file is locked.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

LOCK_TIMEOUT_S = 1.0


def default_uri(storage: Path) -> str:
    """The embedded store of the runs in this local folder."""
    return f"sqlite:///{storage.resolve() / 'mlflow.db'}"


def file_of(uri: str) -> Path | None:
    """The database file of this URI; None for another kind of store."""
    if not uri.startswith("sqlite:"):
        return None
    import sqlalchemy

    database = sqlalchemy.make_url(uri).database
    return Path(database).resolve() if database and database != ":memory:" else None


def probe(database: Path) -> None:
    """Raise sqlite3.Error within a second when the file is locked or damaged: MLflow itself would wait for 20 s."""
    uri = f"file:{quote(str(database))}?mode=rw"
    with closing(sqlite3.connect(uri, timeout=LOCK_TIMEOUT_S, uri=True)) as connection:
        connection.execute("BEGIN IMMEDIATE")


def set_up(database: Path) -> None:
    """Make a new store under another name first: a process killed half-way leaves no half store behind."""
    from mlflow.tracking import MlflowClient

    database.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(database.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not database.exists():
            unfinished = database.with_name(f"{database.name}.new")
            unfinished.unlink(missing_ok=True)
            MlflowClient(f"sqlite:///{unfinished}").search_experiments(max_results=1)
            unfinished.replace(database)
    except BlockingIOError:
        raise BlockingIOError(f"another process is setting up {database} just now") from None
    finally:
        os.close(folder)
