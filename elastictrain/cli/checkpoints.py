"""`elastictrain checkpoints`: the durable checkpoints of a run, whether they are whole, and who signed them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from elastictrain.cli.completion import run_names
from elastictrain.cli.runs import StoredRun, find_run
from elastictrain.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from elastictrain.checkpoint.signature import Signer
    from elastictrain.checkpoint.store import Signature, StoredCheckpoint


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
    signature: Signature | None = None


def checkpoints(
    run: Annotated[
        str, typer.Argument(metavar="RUN", autocompletion=run_names, help="Name of the run.", show_default=False)
    ],
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte and compare the checksums.")] = False,
    signing_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Check signatures too: the run's checkpoint.signing_key_file.")
    ] = None,
    sign: Annotated[
        bool, typer.Option("--sign", help="Sign every checkpoint that is whole, with the first key in that file.")
    ] = False,
    storage: Annotated[str, typer.Option(metavar="DIR", help="Folder or URI that holds the runs.")] = "runs/",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the checkpoints of a run.

    Newest first. Exit status 1 when one of them is damaged, or not signed with the key that is given.
    """
    stored = find_run(storage, run)
    signer = _signer(signing_key_file, run)
    listed = list(_signed(stored, signer) if sign else _listed(stored, verify, signer))
    if as_json:
        typer.echo(json.dumps([asdict(checkpoint) for checkpoint in listed], indent=2))
    elif not listed:
        typer.echo(f"run {run} in {stored.storage.uri} has no checkpoint yet; checkpoint.every says when it writes one")
    else:
        typer.echo("\n".join(map(_line, listed)))
    if any(checkpoint.problem for checkpoint in listed):
        raise typer.Exit(1)


def _signer(key_file: Path | None, run: str) -> Signer | None:
    from elastictrain.checkpoint.signature import Signer

    return None if key_file is None else Signer.load(str(key_file), run)


def _signed(run: StoredRun, signer: Signer | None) -> Iterator[Listed]:
    from elastictrain.checkpoint.store import CheckpointStore

    if signer is None:
        raise ConfigError("--sign needs --signing-key-file FILE, the run's checkpoint.signing_key_file")
    if run.driven(run.status()):
        raise ConfigError(f"run {run.name} is being trained now: stop it, sign, and submit it again with the key")
    store, recorded = CheckpointStore(run.storage, signer), run.recorded_checkpoints()
    for step in sorted(store.steps(), reverse=True):
        try:
            if step not in recorded:
                raise CheckpointError(f"{store.uri(step)} is not in the run's journal: nothing says what it should be")
            yield _whole(store.sign(step, recorded[step]), verified=True)
        except CheckpointError as error:
            yield Listed(step, store.uri(step), None, None, False, str(error))


def _listed(run: StoredRun, verify: bool, signer: Signer | None) -> Iterator[Listed]:
    from elastictrain.checkpoint.store import CheckpointStore, Incomplete

    store = CheckpointStore(run.storage, signer)
    recorded, driven = run.recorded_checkpoints(), run.driven(run.status())
    for checkpoint in store.scan():
        uri = store.uri(checkpoint.step)
        if isinstance(checkpoint, Incomplete):
            if not checkpoint.completed and (driven or checkpoint.step not in recorded):
                continue  # it is being written or removed at this moment, or its writer died: it is no checkpoint
            yield Listed(checkpoint.step, uri, None, None, False if verify else None, checkpoint.problem)
            continue
        problem = None
        if verify:
            try:
                store.verify(checkpoint.step, recorded.get(checkpoint.step))
            except CheckpointError as error:
                problem = str(error)
        yield _whole(checkpoint, problem is None if verify else None, problem)


def _whole(found: StoredCheckpoint, verified: bool | None, problem: str | None = None) -> Listed:
    return Listed(found.step, found.uri, found.num_bytes, found.sha256, verified, problem, found.signature)


def _line(checkpoint: Listed) -> str:
    from elastictrain.tracking.wording import bytes_text

    verdict = {None: "", True: "verified", False: "DAMAGED"}[checkpoint.verified]
    signature = {None: "", "none": "", "valid": "signed", "unchecked": "signed?"}[checkpoint.signature]
    size = "" if checkpoint.bytes is None else bytes_text(checkpoint.bytes)
    sha256 = (checkpoint.sha256 or "")[:12]
    line = f"step {checkpoint.step:<8} {size:>9}  {sha256:<12}  {verdict:<8}  {signature:<7}  {checkpoint.uri}"
    return f"{line}\n  {checkpoint.problem}" if checkpoint.problem else line
