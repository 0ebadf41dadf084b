"""Masters and moments in files on a drive, mapped into memory (`parallel.offload: nvme`).

DeepSpeed keeps them in the host's memory and makes the update there; here that memory becomes the page cache of files:
the kernel writes what has changed to the drive and drops what has not been used for long. So the state can be exported
at any moment, beside forward and backward, as under every other layout, from ZeRO 1 on. DeepSpeed's own way to a drive
takes the tensors out of the process between updates, through a queue that gradients use too; it needs libaio, ZeRO 3.

The files have no names once they are mapped: however the process ends, their room is free again. All of it is taken
when the engine is built, so a full drive is an error then and no crash in the middle of a step.

Cost: an update reads and writes 12 bytes a parameter of this rank's share, and the search for flipped bits and the
snapshot read them again: at the speed of the drive what memory does not hold, at that of memory the rest.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from elastictrain.engine.zero_state import Piece
from elastictrain.errors import InfrastructureError
from elastictrain.state.tensors import PARTS


def move_to_drive(optimizer: torch.optim.Optimizer, pieces: Iterable[Piece], folder: Path) -> None:
    """Put the masters of these pieces, and their moments, into files under `folder`; they stay the same tensors.

    Raises InfrastructureError when the folder can't hold them.
    """
    for master in {id(p.master): p.master for p in pieces}.values():
        moments = [optimizer.state[master][part] for part in PARTS[1:]]
        for tensor in (master, *moments):
            tensor.data = _mapped(tensor.data, folder)


def _mapped(values: Tensor, folder: Path) -> Tensor:
    num_bytes = values.numel() * values.element_size()
    if not num_bytes:
        return values
    try:
        file, path = tempfile.mkstemp(prefix="elastictrain-", dir=folder)
        try:
            os.posix_fallocate(file, 0, num_bytes)
            mapped = torch.from_file(path, shared=True, size=values.numel(), dtype=values.dtype)
        finally:
            os.close(file)
            os.unlink(path)
    except OSError as error:
        raise InfrastructureError(
            f"parallel.offload_path {folder} can't hold {num_bytes} bytes of this worker's masters and moments: "
            f"{error.strerror}. Give it a folder that can, on every node, or set parallel.offload to cpu."
        ) from None
    return mapped.view_as(values).copy_(values)
