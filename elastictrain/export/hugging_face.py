"""A checkpoint as a folder that Hugging Face `transformers` loads: safetensors, config.json, tokenizer. No pickle.

The project's own transformer is written as a Llama or a Mixtral (see `llama`), file by file: memory for FILE_BYTES or
the largest weight, and `transformers` need not be installed. A model of `transformers` is filled and saved by
transformers itself, which takes memory for all of it. Of a model of the user's own there are the weights alone, under
its own names: none of its code is imported. Weights are the fp32 masters. The folder appears whole or not at all.
"""

from __future__ import annotations

import json
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from safetensors.numpy import save_file

from elastictrain.checkpoint.store import CheckpointStore, StoredCheckpoint
from elastictrain.config import TrainConfig
from elastictrain.data.tokenizer import Tokenizer, given_tokenizer
from elastictrain.errors import CheckpointError, ConfigError
from elastictrain.state.manifest import Manifest
from elastictrain.state.source import StateSource
from elastictrain.state.tensors import BYTES_PER_ELEMENT, Fragment, LogicalTensor
from elastictrain.workloads.llama import llama_config, llama_names

FILE_BYTES = 2 << 30
"""Of one safetensors file, unless a single weight is larger."""

_PARAMETER = "param/"


@dataclass(frozen=True)
class Exported:
    """What has been written."""

    run: str
    step: int
    folder: Path
    num_parameters: int
    num_bytes: int
    """Of all files."""


def export(
    config: TrainConfig,
    store: CheckpointStore,
    stored: StoredCheckpoint,
    tokenizer: Tokenizer | None,
    to: Path,
    file_bytes: int = FILE_BYTES,
) -> Exported:
    """Write a verified checkpoint of the run to the folder `to`, which must not be there, or be empty.

    Without a tokenizer, which is with a run that reads no text, it is a model of the user's own.

    Raises ConfigError for a folder that can't be written and for a model that `transformers` has no name for here,
    CheckpointError when the checkpoint can't be read.
    """
    if config.model.num_experts is not None and config.model.experts_per_token == 1:
        raise ConfigError(
            "a model with model.experts_per_token 1 can't be exported: transformers has none that weighs its one "
            "expert by the router's probability; train with model.experts_per_token 2 for a Mixtral"
        )
    source, manifest = store.open(stored.step), stored.manifest
    with _appearing(to) as folder:
        for name, text in (tokenizer.files() if tokenizer else {}).items():
            (folder / name).write_text(text, encoding="utf-8")
        if tokenizer is None or config.model.kind == "own":
            parameters = _parameters(manifest)
            names = {tensor.name: tensor.name.removeprefix(_PARAMETER) for tensor in parameters}
            _write_weights(source, manifest, parameters, names, folder, file_bytes)
        elif config.model.kind == "huggingface":
            _write_their_model(config, source, tokenizer, folder)
        else:
            _write_llama(config, source, manifest, tokenizer, folder, file_bytes)
            if config.model.path is not None:
                _copy_what_is_theirs(config, tokenizer, folder)
        _open_to_readers(folder)
        num_bytes = sum(file.stat().st_size for file in folder.iterdir())
    return Exported(manifest.run, manifest.step, to, sum(t.numel for t in _parameters(manifest)), num_bytes)


def _parameters(manifest: Manifest) -> list[LogicalTensor]:
    return [tensor for tensor in manifest.tensors if tensor.name.startswith(_PARAMETER)]


def _write_llama(
    config: TrainConfig, source: StateSource, manifest: Manifest, tokenizer: Tokenizer, folder: Path, file_bytes: int
) -> None:
    parameters, names = _parameters(manifest), llama_names(config.model)
    shapes = {tensor.name.removeprefix(_PARAMETER): tensor.shape for tensor in parameters}
    if other := sorted(shapes.keys() ^ names.keys()):
        raise CheckpointError(f"the checkpoint is not of the model that config.json describes: see {other[0]}")
    theirs = {tensor.name: names[tensor.name.removeprefix(_PARAMETER)] for tensor in parameters}
    content = llama_config(config.model, shapes, config.data.seq_len, tokenizer.end_of_text_id)
    _write_json(folder / "config.json", content)
    _write_weights(source, manifest, parameters, theirs, folder, file_bytes)


def _write_weights(
    source: StateSource,
    manifest: Manifest,
    parameters: list[LogicalTensor],
    names: Mapping[str, str],
    folder: Path,
    file_bytes: int,
) -> None:
    """The parameters under these names, file by file."""
    groups, held = list[list[LogicalTensor]](), file_bytes
    for tensor in parameters:
        num_bytes = tensor.numel * BYTES_PER_ELEMENT
        if held + num_bytes > file_bytes:
            groups.append([])
            held = 0
        groups[-1].append(tensor)
        held += num_bytes
    where = dict[str, str]()
    for number, group in enumerate(groups, 1):
        file = _file_name(number, len(groups))
        arrays = {names[name]: array for name, array in _read(source, group).items()}
        save_file(arrays, folder / file, {"format": "pt", "run": manifest.run, "step": str(manifest.step)})
        where |= dict.fromkeys(arrays, file)
    if len(groups) > 1:
        total = sum(tensor.numel for tensor in parameters) * BYTES_PER_ELEMENT
        _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})


def _read(source: StateSource, tensors: list[LogicalTensor]) -> dict[str, Any]:
    arrays = {tensor.name: np.empty(tensor.numel, np.float32) for tensor in tensors}
    source.fill([(Fragment(name, 0, len(array)), array.data) for name, array in arrays.items()])
    return {tensor.name: arrays[tensor.name].reshape(tensor.shape) for tensor in tensors}


def _file_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _write_their_model(config: TrainConfig, source: StateSource, tokenizer: Tokenizer, folder: Path) -> None:
    from elastictrain.workloads import build_workload

    module: Any = build_workload(config, tokenizer.vocab_size).build(config.train.seed)
    targets = {f"{_PARAMETER}{name}": p.detach().view(-1).numpy() for name, p in module.named_parameters()}
    source.fill([(Fragment(name, 0, len(array)), array.data) for name, array in targets.items()])
    module.eval().save_pretrained(folder)
    _copy_what_is_theirs(config, tokenizer, folder)


def _copy_what_is_theirs(config: TrainConfig, tokenizer: Tokenizer, folder: Path) -> None:
    """What the folder that the run began with has beside its model."""
    theirs = Path(str(config.model.path)).expanduser()
    names = ["generation_config.json"]
    if (found := given_tokenizer(config)) and found.sha256() == tokenizer.sha256() and config.data.tokenizer is None:
        names += ["tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"]
    for name in names:
        if (theirs / name).is_file():
            shutil.copyfile(theirs / name, folder / name)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _open_to_readers(folder: Path) -> None:
    """Give all files the mode that new ones have here: safetensors writes its own for the owner alone."""
    new = folder / ".new"
    new.touch()
    mode = stat.S_IMODE(new.stat().st_mode)
    new.unlink()
    for file in folder.iterdir():
        file.chmod(mode)


@contextmanager
def _appearing(to: Path) -> Iterator[Path]:
    """A folder to fill, that gets its name when it is complete."""
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ConfigError(f"--to {to} is there already: choose a folder that is not, or empty it")
    passing = to.with_name(f".{to.name}.{uuid4().hex[:8]}")
    try:
        passing.mkdir(parents=True)
        yield passing
        if to.exists():
            to.rmdir()
        passing.rename(to)
    except OSError as error:
        raise ConfigError(f"--to {to} can't be written: {error.strerror or error}. Choose another folder.") from None
    finally:
        shutil.rmtree(passing, ignore_errors=True)
