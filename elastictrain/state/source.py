"""Where state is read from: the one interface under recovery, resume and reshard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from elastictrain.state.tensors import Fragment


class StateSource(Protocol):
    """A whole training state, wherever it lies."""

    @property
    def scalars(self) -> Mapping[str, int | float]:
        """State that is no tensor, such as `optimizer_step`."""
        ...

    def fill(self, targets: Sequence[tuple[Fragment, memoryview]]) -> None:
        """Write each fragment's fp32 elements into its buffer (writable, contiguous, 4 x numel bytes).

        Reads only what is asked for. Raises CheckpointError when the state does not hold all of it.
        """
        ...
