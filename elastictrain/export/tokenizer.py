"""The tokenizer that a run's model reads and writes with: that of the data which the run was trained on."""

from __future__ import annotations

from pathlib import Path

from elastictrain.data.manifest import Manifest
from elastictrain.data.tokenizer import Tokenizer
from elastictrain.errors import DataError


def tokenizer_of(run: str, uri: str, sha256: str, storage: Path | None) -> Tokenizer:
    """Of the data at `uri`, whose manifest has this hash; or of that beside the run, if its storage was moved there.

    Raises DataError when it is not there, or is another's.
    """
    places = [Path(uri)]
    if storage is not None:
        places.insert(0, storage / places[0].parent.name / places[0].name)
    for place in places:
        if place.is_dir():
            manifest = Manifest.load(place)
            tokenizer = manifest.tokenizer()
            if tokenizer.sha256() != manifest.tokenizer_sha256 or manifest.sha256() != sha256:
                raise DataError(f"{place} is not what the run was trained on: submit the run again to prepare it anew")
            return tokenizer
    raise DataError(f"the tokenizer of run {run} was in {places[-1]}, which is not here: go where the run was trained")
