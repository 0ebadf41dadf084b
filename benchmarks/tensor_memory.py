"""The bytes that live tensors hold, at every operation of a thread: exact, on any device.

Every operator's new storages are noted under a weak reference, and counted until nobody holds them. A profiler's
record of the CPU allocator would say the same of one process alone; but collectives free tensors in threads of their
own, which it does not see. What an operator allocates and frees inside itself is not counted. Cost: an operator takes
ten times as long.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's, here and below
    """Enter it before the first tensor is made; `peak_bytes` is the most so far, since `reset_peak`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.live_bytes = 0
        self.peak_bytes = 0

    def reset_peak(self) -> None:
        """Forget what was; the peak begins with what is."""
        self._forget_dead()
        self.peak_bytes = self.live_bytes

    def __torch_dispatch__(
        self,
        operator: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = operator(*args, **(kwargs or {}))
        made = [
            tensor.untyped_storage()
            for tensor in tree_leaves(result)
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta" and self._is_new(tensor)
        ]
        if made:
            self._forget_dead()
            for storage in made:
                if storage._cdata not in self._live:
                    self._live[storage._cdata] = _weak(storage), storage.nbytes()
                    self.live_bytes += storage.nbytes()
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        return result

    def _is_new(self, tensor: torch.Tensor) -> bool:
        known = self._live.get(tensor.untyped_storage()._cdata)
        return known is None or _is_gone(known[0])

    def _forget_dead(self) -> None:
        for address in [a for a, (reference, _) in self._live.items() if _is_gone(reference)]:
            self.live_bytes -= self._live.pop(address)[1]


def _weak(storage: Any) -> StorageWeakRef:
    return StorageWeakRef(storage)  # type: ignore[no-untyped-call]


def _is_gone(reference: StorageWeakRef) -> bool:
    return bool(reference.expired())  # type: ignore[no-untyped-call]
