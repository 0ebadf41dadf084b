"""A finished model in MLflow's registry: a version with signature and card that points to its checkpoint.

The weights stay where they are, verified by their hashes: what MLflow stores is an `MLmodel` file that names them, the
card and, of a model of language, the run's config, from which `export.pyfunc` loads it. Nothing here is pickled, and
nothing has to be unpickled to use it. Doing it twice changes nothing. The alias `last` is the newest version of the
run's name, `best` the one with the lowest loss on held-out text.
"""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Mapping
from math import inf, isfinite
from pathlib import Path
from typing import Any

from elastictrain.tracking.exact_json import dumps

_KEPT = ("step", "uri", "sha256", "evaluation_loss", "bits_per_byte")
"""Tags of the checkpoint that the version has too."""

LOADED_FROM = "run.json"
"""Artifact of a model of language: the run's config, the data that has its tokenizer, the checkpoint."""
LOADER = "elastictrain.export.pyfunc"


def register(
    client: Any, name: str, run_id: str, model: Any, card: str, text_model: Mapping[str, Any] | None, *, served: bool
) -> None:
    """Make this logged model, a checkpoint of the run, a version of the registered model of this name.

    `served`: by an MLflow server, not from a file. `text_model`: `config` and `data` of a language model's run.
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
            Path(folder, "MLmodel").write_text(_mlmodel(run_id, model, text_model is not None), encoding="utf-8")
            if text_model is not None:
                tags_of = {key: model.tags[f"elastictrain.{key}"] for key in ("step", "sha256")}
                told = {**text_model, "step": int(tags_of["step"]), "sha256": tags_of["sha256"]}
                Path(folder, LOADED_FROM).write_text(dumps(told, indent=1), encoding="utf-8")
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
    """MLflow's description of a model; of one of language: texts in, how likely they are and what follows out."""
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    scores = [ColSpec("double", "nats"), ColSpec("long", "num_tokens"), ColSpec("double", "bits_per_byte")]
    signature = ModelSignature(
        inputs=Schema([ColSpec("string")]),
        outputs=Schema([ColSpec("string", "continuation"), *scores]),
        params=ParamSchema([ParamSpec("num_tokens", "long", 0), ParamSpec("seed", "long", 0)]),
    )
    weights = {key: model.tags[f"elastictrain.{key}"] for key in ("uri", "sha256", "step")}
    flavors: dict[str, dict[str, Any]] = {"elastictrain": {**weights, "format": "safetensors"}}
    if of_text:
        flavors["python_function"] = {"loader_module": LOADER, "python_version": platform.python_version()}
    text: str = Model(
        run_id=run_id,
        signature=signature if of_text else None,
        flavors=flavors,
        model_id=model.model_id,
    ).to_yaml()
    return text
