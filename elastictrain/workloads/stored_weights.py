"""Weights of a folder's safetensors, for this project's transformer: each rank reads what it holds, and no more.

They are fp32 in memory whatever type they have in the files. Names are those of `llama`; files are found by what they
hold, so no index is read. A folder without any is a model that is drawn anew; one with weights as pickles alone is
refused, since those can run code when they are opened.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from elastictrain.errors import ConfigError

PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
Whole = Mapping[str, tuple[int, ...]]
"""Shapes of the whole model's parameters, by this project's names."""


class StoredWeights:
    """The weights of one folder."""

    def __init__(self, folder: Path, names: Mapping[str, str], whole: Whole) -> None:
        """`names` are those in the files, by this project's.

        Raises ConfigError where one is missing or of another shape.
        """
        self._folder, self._names, self._whole = folder, names, whole
        self._files: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with self._open(path) as file:
                self._files |= {name: path for name in file.keys() if name not in self._files}  # noqa: SIM118 - no dict
        for name, theirs in names.items():
            self._check(name, theirs)

    def fill(self, module: nn.Module, shares: Mapping[str, tuple[int, range]]) -> None:
        """Every parameter of a part; `shares` are the dimension and the rows of it that are there, of those split."""
        wanted: dict[Path, list[tuple[str, nn.Parameter]]] = defaultdict(list)
        for name, parameter in module.named_parameters():
            wanted[self._files[self._names[name]]].append((name, parameter))
        for path, parameters in wanted.items():
            with self._open(path) as file, torch.no_grad():
                for name, parameter in parameters:
                    stored = file.get_slice(self._names[name])
                    dimension, rows = shares.get(name, (0, range(self._whole[name][0])))
                    mine = slice(rows.start, rows.stop)
                    parameter.copy_(stored[mine] if dimension == 0 else stored[:, mine])

    def _check(self, name: str, theirs: str) -> None:
        if theirs not in self._files:
            raise ConfigError(
                f"model.path {self._folder} has no weight {theirs} in its safetensors, and its config.json asks for "
                "it: copy all of the model's files, or remove the safetensors to start from random weights"
            )
        with self._open(self._files[theirs]) as file:
            shape = tuple(file.get_slice(theirs).get_shape())
        if shape != self._whole[name]:
            raise ConfigError(
                f"model.path {self._folder}: {theirs} is {shape} in {self._files[theirs].name}, and "
                f"{self._whole[name]} by config.json: they are not of one model"
            )

    def _open(self, path: Path) -> Any:
        try:
            return safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"model.path {self._folder}: can't read {path.name}: {error}") from None


def has_weights(folder: Path) -> bool:
    """Whether there are safetensors; raises ConfigError where there is another form of weights alone."""
    if any(folder.glob("*.safetensors")):
        return True
    pickled = next((file for pattern in PICKLED for file in folder.glob(pattern)), None)
    if pickled is not None:
        raise ConfigError(
            f"model.path {folder} has weights only as pickle ({pickled.name}), which can run code when opened: save "
            "them as safetensors, or remove them to start from random weights"
        )
    if (folder / "zero").is_dir():
        raise ConfigError(
            f"model.path {folder} is a universal checkpoint, which model.kind transformer does not begin with: set "
            "model.kind to huggingface"
        )
    return False
