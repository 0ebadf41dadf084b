"""Preparing a corpus ahead of a run, for the scripts in jobs/."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from elastictrain.config import TrainConfig


def run_preparation(config: TrainConfig) -> int:
    """Have the config's corpus as token shards in its storage, where its runs find them; returns the exit status.

    Raises what `data.prepare` raises.
    """
    from elastictrain.data.prepare import prepare
    from elastictrain.runtime.cluster import connected
    from elastictrain.runtime.home import DATA_FOLDER, local_root, settled
    from elastictrain.storage import Storage
    from elastictrain.tracking.wording import bytes_text, seconds_text

    config = settled(config)
    storage = Storage.open(config.run.storage)
    storage.check_writable()
    with connected(config):
        prepared = prepare(config, local_root(storage) / DATA_FOLDER)
    manifest = prepared.manifest
    how = "found unchanged" if prepared.reused else f"prepared in {seconds_text(prepared.seconds)}"
    typer.echo(f"{how}: {manifest.folder}")
    typer.echo(
        f"{manifest.num_documents:,} documents, {bytes_text(manifest.num_bytes)}, {manifest.num_tokens:,} tokens of "
        f"{manifest.vocab_size:,}; {manifest.num_samples:,} samples of {manifest.seq_len}, "
        f"{manifest.num_validation_samples:,} held out"
    )
    return 0
