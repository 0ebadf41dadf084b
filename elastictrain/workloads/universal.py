"""A DeepSpeed universal checkpoint as a run's beginning: `zero/<parameter>/` with fp32.pt, exp_avg.pt, exp_avg_sq.pt.

With the moments of all parameters, AdamW goes on where it was: its moments and its count of updates, which corrects
their bias, are a state like any other, so any layout takes it. Without any moments only the weights are taken.

These files are pickles. torch's weights-only unpickler reads them, which makes tensors and plain values and calls
nothing; a file that asks for more is refused. Only names that the model has are looked for.

Cost: one read of the files, mapped into memory; of the moments only what a rank needs.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from elastictrain.errors import ConfigError
from elastictrain.state.source import StateSource
from elastictrain.state.tensors import PARTS, Fragment, LogicalTensor

_FOLDER = "zero"
_FILES = dict(zip(PARTS, ("fp32.pt", "exp_avg.pt", "exp_avg_sq.pt"), strict=True))
_STEP = "step.pt"
_ENGINES = "*_model_states.pt"


def is_universal(folder: Path) -> bool:
    """Whether the folder is a universal checkpoint, as `ds_to_universal` writes it, and has no safetensors, which come
    first."""
    has_weights = any(folder.glob("*.safetensors"))
    return not has_weights and next((folder / _FOLDER).glob(f"*/{_FILES[PARTS[0]]}"), None) is not None


def load_universal(module: nn.Module, folder: Path) -> None:
    """Fill the module; raises ConfigError that names the parameter and what is wrong with its file."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(_read(folder / _FOLDER / name / _FILES[PARTS[0]], tuple(parameter.shape)))


def universal_state(folder: Path, tensors: Iterable[LogicalTensor]) -> StateSource | None:
    """The state of the optimizer that the folder goes on with; None where it has no moments.

    Raises ConfigError when it has some but not all of them, or they are not those of one moment of training.
    """
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    moments = [path for name in shapes if (path := _path(folder, name)).name != _FILES[PARTS[0]]]
    missing = [path for path in moments if not path.is_file()]
    if len(missing) == len(moments):
        return None
    if missing:
        raise ConfigError(
            f"{missing[0]} is not there, and moments of other parameters are: copy all of {folder / _FOLDER}, or "
            "remove every exp_avg.pt and exp_avg_sq.pt there to begin with the weights alone"
        )
    return _Universal(folder, shapes, _num_updates(folder, shapes))


class _Universal:
    """See `state.source.StateSource`."""

    def __init__(self, folder: Path, shapes: Mapping[str, tuple[int, ...]], num_updates: int) -> None:
        self._folder, self._shapes = folder, shapes
        self.scalars: Mapping[str, int | float] = {"optimizer_step": num_updates}

    def fill(self, targets: Sequence[tuple[Fragment, memoryview]]) -> None:
        """See there."""
        for fragment, view in targets:
            values = _read(_path(self._folder, fragment.tensor), self._shapes[fragment.tensor]).reshape(-1)
            if fragment.numel:
                torch.frombuffer(view, dtype=torch.float32).copy_(values[fragment.start : fragment.stop])


def _path(folder: Path, tensor: str) -> Path:
    part, _, parameter = tensor.partition("/")
    return folder / _FOLDER / parameter / _FILES[part]


def _num_updates(folder: Path, shapes: Iterable[str]) -> int:
    """That the optimizer had made, the same of all parameters; of ZeRO 3 only the engine's own count is kept."""
    paths = {_path(folder, name).with_name(_STEP) for name in shapes}
    found = {float(_load(path)) for path in paths if path.is_file()}
    if not found:
        engines = [_load(path) for path in sorted(folder.glob(_ENGINES))[:1]]
        found = {engine["global_steps"] - engine["skipped_steps"] for engine in engines}
    if len(found) != 1:
        told = ", ".join(f"{step:g}" for step in sorted(found)) or "none"
        raise ConfigError(
            f"{folder / _FOLDER} has moments, and of the updates that they come from it says {told}: it needs one and "
            f"the same number in each parameter's {_STEP}, or a {_ENGINES} beside it; remove every exp_avg.pt and "
            "exp_avg_sq.pt there to begin with the weights alone"
        )
    return int(found.pop())


def _read(path: Path, shape: tuple[int, ...]) -> Tensor:
    found = _load(path)
    values = found.get("param") if isinstance(found, dict) else found  # ZeRO 3 writes the tensor alone
    if not isinstance(values, Tensor) or values.numel() != torch.Size(shape).numel():
        size = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ConfigError(f"{path} holds {size}, and the model needs {shape}")
    return values.reshape(shape)


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise ConfigError(f"{path} is not there: the checkpoint is of another model than config.json says") from None
    except (pickle.UnpicklingError, OSError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"{path} holds more than a weight, or is damaged, and is not read: {reason}") from None
