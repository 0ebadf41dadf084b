"""`elastictrain checkpoints`: the durable checkpoints of a run, and whether they are whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated

import typer

from elastictrain.cli.runs import StoredRun, find_run
from elastictrain.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Listed:
    """One checkpoint as `--json` prints it; what a damaged one can't say of itself is None."""

    step: int
    uri: str
    bytes: int | None
    sha256: str | None
    verified: bool | None
    """None where it was not asked for."""
    problem: str | None = None


def checkpoints(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Name of the run.", show_default=False)],
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte and compare the checksums.")] = False,
    storage: Annotated[str, typer.Option(metavar="DIR", help="Folder or URI that holds the runs.")] = "runs/",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the checkpoints of a run.

    Newest first. Exit status 1 when one of them is damaged.
    """
    stored = find_run(storage, run)
    listed = list(_listed(stored, verify))
    if as_json:
        typer.echo(json.dumps([asdict(checkpoint) for checkpoint in listed], indent=2))
    elif not listed:
        typer.echo(f"run {run} in {stored.storage.uri} has no checkpoint yet; checkpoint.every says when it writes one")
    else:
        typer.echo("\n".join(map(_line, listed)))
    if any(checkpoint.problem for checkpoint in listed):
        raise typer.Exit(1)


def _listed(run: StoredRun, verify: bool) -> Iterator[Listed]:
    from elastictrain.checkpoint.store import CheckpointStore, Incomplete

    store = CheckpointStore(run.storage)
    recorded = run.recorded_checkpoints() if verify else {}
    found = store.scan()
    if found and isinstance(found[0], Incomplete) and run.driven(run.status()):
        found = found[1:]  # the newest is being written at this moment
    for checkpoint in found:
        uri = store.uri(checkpoint.step)
        if isinstance(checkpoint, Incomplete):
            yield Listed(checkpoint.step, uri, None, None, False if verify else None, checkpoint.problem)
            continue
        problem = None
        if verify:
            try:
                store.verify(checkpoint.step, recorded.get(checkpoint.step))
            except CheckpointError as error:
                problem = str(error)
        verified = problem is None if verify else None
        yield Listed(checkpoint.step, uri, checkpoint.num_bytes, checkpoint.sha256, verified, problem)


def _line(checkpoint: Listed) -> str:
    from elastictrain.tracking.wording import bytes_text

    verdict = {None: "", True: "verified", False: "DAMAGED"}[checkpoint.verified]
    size = "" if checkpoint.bytes is None else bytes_text(checkpoint.bytes)
    line = f"step {checkpoint.step:<8} {size:>9}  {(checkpoint.sha256 or '')[:12]:<12}  {verdict:<8}  {checkpoint.uri}"
    return f"{line}\n  {checkpoint.problem}" if checkpoint.problem else line
