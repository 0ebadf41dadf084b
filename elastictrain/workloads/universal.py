"""The weights of a DeepSpeed universal checkpoint: `zero/<parameter>/fp32.pt`, one file a parameter.

These files are pickles. torch's weights-only unpickler reads them, which makes tensors and plain values and calls
nothing; a file that asks for more is refused. Only names that the model has are looked for. The optimizer's moments are
left where they are: a run that starts from these weights begins with its own.

Cost: one read of the files; memory for one parameter beside the model.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor, nn

from elastictrain.errors import ConfigError

_FOLDER = "zero"
_WEIGHTS = "fp32.pt"


def is_universal(folder: Path) -> bool:
    """Whether the folder is a universal checkpoint, as `ds_to_universal` writes it."""
    return next((folder / _FOLDER).glob(f"*/{_WEIGHTS}"), None) is not None


def load_universal(module: nn.Module, folder: Path) -> None:
    """Fill the module; raises ConfigError that names the parameter and what is wrong with its file."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(_read(folder / _FOLDER / name / _WEIGHTS, parameter))


def _read(path: Path, parameter: Tensor) -> Tensor:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise ConfigError(f"{path} is not there: the checkpoint is of another model than config.json says") from None
    except (pickle.UnpicklingError, OSError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"{path} holds more than a weight, or is damaged, and is not read: {reason}") from None
    weight = found.get("param") if isinstance(found, dict) else found  # ZeRO 3 writes the tensor alone
    if not isinstance(weight, Tensor) or weight.numel() != parameter.numel():
        size = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise ConfigError(f"{path} holds {size}, and the model needs {tuple(parameter.shape)}")
    return weight.reshape(parameter.shape)
