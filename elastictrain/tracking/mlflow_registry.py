"""A finished model in MLflow's registry: a version with signature and card that points to its checkpoint.

The weights stay where they are, verified by their hashes: what MLflow stores is an `MLmodel` file that names them, and
the card. Nothing here is pickled, and nothing has to be unpickled to use it. Doing it twice changes nothing. The alias
`last` is the newest version of the run's name, `best` the one with the lowest loss on held-out text.
"""

from __future__ import annotations

import tempfile
from math import inf, isfinite
from pathlib import Path
from typing import Any

_KEPT = ("step", "uri", "sha256", "evaluation_loss", "bits_per_byte")
"""Tags of the checkpoint that the version has too."""


def register(client: Any, name: str, run_id: str, model: Any, card: str, *, served: bool, of_text: bool) -> None:
    """Make this logged model, a checkpoint of the run, a version of the registered model of this name.

    `served`: by an MLflow server, not from a file. `of_text`: a model of language, whose signature is known.
    """
    tags = {
        f"elastictrain.{tag}": model.tags[f"elastictrain.{tag}"] for tag in _KEPT if f"elastictrain.{tag}" in model.tags
    }
    _create(client, name)
    versions = _versions(client, name)
    mine = next((v for v in versions if v.run_id == run_id and _same(v.tags, tags)), None)
    if mine is None:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "README.md").write_text(card, encoding="utf-8")
            Path(folder, "MLmodel").write_text(_mlmodel(run_id, model, of_text), encoding="utf-8")
            client.log_model_artifacts(model.model_id, folder)
        # by its place, where the store is a file: MLflow would look a model up in the process's global store
        by_id = {"source": f"models:/{model.model_id}", "model_id": model.model_id}
        where = by_id if served else {"source": model.artifact_location}
        mine = client.create_model_version(name, run_id=run_id, tags=tags, description=card, **where)
        versions.append(mine)
    client.set_registered_model_alias(name, "last", mine.version)
    client.set_registered_model_alias(name, "best", min(versions, key=_loss).version)


def _create(client: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, description="Trained with elastictrain; each version has a card.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _versions(client: Any, name: str) -> list[Any]:
    found: list[Any] = []
    token = None
    while True:
        page = client.search_model_versions(f"name = '{name}'", page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def _same(one: dict[str, str], other: dict[str, str]) -> bool:
    return all(one.get(f"elastictrain.{tag}") == other.get(f"elastictrain.{tag}") for tag in ("uri", "sha256"))


def _loss(version: Any) -> tuple[float, int]:
    """Without an evaluation, the newer is the better."""
    loss = float(version.tags.get("elastictrain.evaluation_loss", inf))
    return (loss if isfinite(loss) else inf), -int(version.version)


def _mlmodel(run_id: str, model: Any, of_text: bool) -> str:
    """MLflow's description of a model; of one of language: tokens in, a score for each token of the vocabulary out."""
    import numpy as np
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype("int64"), (-1, -1), "tokens")]),
        outputs=Schema([TensorSpec(np.dtype("float32"), (-1, -1, -1), "logits")]),
    )
    weights = {key: model.tags[f"elastictrain.{key}"] for key in ("uri", "sha256", "step")}
    flavor = {**weights, "format": "safetensors"}
    text: str = Model(
        run_id=run_id,
        signature=signature if of_text else None,
        flavors={"elastictrain": flavor},
        model_id=model.model_id,
    ).to_yaml()
    return text
