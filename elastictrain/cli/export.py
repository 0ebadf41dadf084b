"""`elastictrain export`: a checkpoint as a folder that Hugging Face `transformers` loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from elastictrain.cli.completion import run_names
from elastictrain.cli.runs import StoredRun, find_run
from elastictrain.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from elastictrain.checkpoint.store import CheckpointStore, StoredCheckpoint
    from elastictrain.config import TrainConfig
    from elastictrain.data.tokenizer import Tokenizer


def export(
    run: Annotated[
        str, typer.Argument(metavar="RUN", autocompletion=run_names, help="Name of the run.", show_default=False)
    ],
    to: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write; not there yet, or empty.")],
    step: Annotated[
        int | None, typer.Option(help="Of the checkpoint; without it, the newest that is whole.", show_default=False)
    ] = None,
    storage: Annotated[str, typer.Option(metavar="DIR", help="Folder or URI that holds the runs.")] = "runs/",
) -> None:
    """Write a checkpoint as a Hugging Face folder.

    Safetensors, config.json and tokenizer: AutoModelForCausalLM.from_pretrained(DIR) gives the same logits. Of a model
    of your own (model.kind own) the safetensors alone. The checkpoint is verified first.
    """
    from elastictrain.checkpoint.of_run import checkpoints_of
    from elastictrain.export.hugging_face import export as write
    from elastictrain.tracking.wording import bytes_text

    stored = find_run(storage, run)
    config = _config(stored, storage)
    store = checkpoints_of(config)
    found = _verified(stored, store, step)
    tokenizer = _tokenizer(stored) if config.data.samples is None else None
    done = write(config, store, found, tokenizer, to)
    typer.echo(
        f"step {done.step:,} of run {done.run}: {done.num_parameters:,} parameters, "
        f"{bytes_text(done.num_bytes)} in {done.folder}"
    )


def _config(run: StoredRun, storage: str) -> TrainConfig:
    """The run's config; the storage is where it was found now."""
    from elastictrain.config import TrainConfig

    try:
        data = json.loads(run.storage.read("config.json"))
        data["run"]["storage"] = storage
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise DataError(f"{run.storage.uri}/config.json can't be read: {error}") from None
    return TrainConfig.from_dict(data, f"{run.storage.uri}/config.json")


def _verified(run: StoredRun, store: CheckpointStore, step: int | None) -> StoredCheckpoint:
    recorded = run.recorded_checkpoints()
    if step is not None:
        if step not in recorded:
            kept = ", ".join(str(s) for s in sorted(store.steps() & set(recorded))) or "none"
            raise CheckpointError(f"run {run.name} has no checkpoint of step {step}; it keeps {kept}")
        return store.verify(step, recorded[step])
    found = store.newest_verified(
        {s: sha256 for s, sha256 in recorded.items() if s in store.steps()},
        lambda step, _, problem: typer.echo(f"checkpoint of step {step} is left out: {problem}", err=True),
        lambda _: "nothing vouches for it",
    )
    if found is None:
        raise CheckpointError(f"run {run.name} in {run.storage.uri} has no checkpoint yet")
    return found


def _tokenizer(run: StoredRun) -> Tokenizer:
    """Of the data that the run was trained on: where that was, or beside the run, if the storage was moved."""
    from elastictrain.events import DataReady
    from elastictrain.export.tokenizer import tokenizer_of

    ready = next((e for e in reversed(run.events()) if isinstance(e, DataReady)), None)
    if ready is None:
        raise DataError(f"run {run.name} has prepared no data, so there is no tokenizer")
    beside = run.storage.local.parent if run.storage.local is not None else None
    return tokenizer_of(run.name, ready.uri, ready.sha256, beside)
