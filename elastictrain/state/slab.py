"""Which elements of a logical tensor a rank's share of it holds: rows, or columns, of the whole.

Elements are counted flat, row by row. A share of the rows is one range of the whole; a share of the columns is one
range in each row. So a share of columns makes as many fragments as the tensor has rows: a rank of a model with L layers
and hidden size H tells of 6 L H of them, some hundred bytes each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from elastictrain.state.tensors import Fragment


@dataclass(frozen=True, slots=True)
class Slab:
    """Runs of `width` elements, one every `stride` elements, the first at `start`."""

    start: int
    width: int
    stride: int

    @classmethod
    def of(cls, shape: tuple[int, ...], dimension: int, share: range) -> Slab:
        """These rows (dimension 0) or columns (dimension 1) of a matrix."""
        _, columns = shape
        if dimension == 0:
            return cls(share.start * columns, len(share) * columns, len(share) * columns)
        return cls(share.start, len(share), columns)

    def fragments(self, tensor: str, start: int, numel: int) -> Iterator[Fragment]:
        """Where the share's own elements [start, start + numel) lie in the whole, in order."""
        stop = start + numel
        while start < stop:
            row, column = divmod(start, self.width)
            run = min(self.width - column, stop - start)
            yield Fragment(tensor, self.start + row * self.stride + column, run)
            start += run
