"""Models that are outlined first, on torch's meta device: layers cost nothing there, and draw nothing."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def with_memory(module: M, dtype: torch.dtype, device: torch.device) -> M:
    """The same module; what lies on meta gets memory of this type there, which holds anything. All else stays."""

    def room(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=dtype, device=device) if tensor.is_meta else tensor

    # as to_empty does it, but that imports a library for symbolic sizes
    module._apply(room)  # type: ignore[no-untyped-call]  # torch's
    return module
