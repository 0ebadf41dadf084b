"""Moving a rank's pieces between its masters and host memory.

Pieces that lie side by side in a master travel as one run, so a shard is a handful of copies: 6 for ZeRO 1 and 2,
whatever the number of parameters. A copy releases the GIL and runs at memory speed (about 5 GB/s a core). On CUDA it
goes through pinned memory on a stream of its own, beside the next forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from elastictrain.engine.update_fence import UpdateFence
from elastictrain.engine.zero_state import Piece
from elastictrain.state.slab import Slab
from elastictrain.state.source import StateSource
from elastictrain.state.tensors import BYTES_PER_ELEMENT, PARTS, Fragment, ShardIndex

Moments = Mapping[Tensor, Mapping[str, Tensor]]
Slabs = Mapping[str, Slab]


class ShardExporter:
    """Copies one rank's shard to the host, again and again, from any one thread at a time."""

    def __init__(self, pieces: Sequence[Piece], moments: Moments, slabs: Slabs) -> None:
        """`slabs` say where the parameters lie in those of the whole model that are shares of them."""
        self.index = ShardIndex(tuple(f for part in PARTS for p in pieces for f in _fragments(part, p, slabs)))
        self.runs = runs_of(pieces, moments)
        """The shard where it lies, in the order of its export, by what each run holds, for people."""
        self._stream: torch.cuda.Stream | None = None
        if any(run.is_cuda for run in self.runs.values()):
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch's
            self._updated = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's
            self._updates = UpdateFence(self._updated)
            self._staging = torch.empty(self.index.numel, dtype=torch.float32, pin_memory=True)

    def mark_updated(self) -> None:
        """Note that the updates enqueued so far are what the next copy must see (training thread)."""
        if self._stream is not None:
            self._updates.mark()

    def fence(self) -> None:
        """See `base.Engine.fence`."""
        if self._stream is not None:
            self._updates.fence()

    def copy_into(self, buffer: memoryview | Tensor) -> None:
        """Fill `buffer` with the shard; returns when it is there.

        Raises PeerLostError where it may be wrong: see `fence`.
        """
        if not self.runs:
            return
        target = buffer if isinstance(buffer, Tensor) else torch.frombuffer(buffer, dtype=torch.float32)
        if self._stream is None:
            self._copy_runs(target)
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._updated)
            self._copy_runs(self._staging)
        self._stream.synchronize()
        self._updates.check()
        target[: self._staging.numel()].copy_(self._staging)

    def _copy_runs(self, target: Tensor) -> None:
        at = 0
        for run in self.runs.values():
            target[at : at + run.numel()].copy_(run, non_blocking=True)
            at += run.numel()


def import_pieces(pieces: Sequence[Piece], moments: Moments, source: StateSource, slabs: Slabs) -> None:
    """Overwrite the pieces and their moments with what `source` holds of them, asking once."""
    views = [(part, piece, piece.view(part, moments)) for part in PARTS for piece in pieces]
    # CPU tensors are filled where they lie.
    hosts = [view if view.device.type == "cpu" else torch.empty_like(view, device="cpu") for _, _, view in views]
    targets = []
    for (part, piece, _), host in zip(views, hosts, strict=True):
        data, at = host.numpy().data.cast("B"), 0
        for fragment in _fragments(part, piece, slabs):
            num_bytes = fragment.numel * BYTES_PER_ELEMENT
            targets.append((fragment, data[at : at + num_bytes]))
            at += num_bytes
    source.fill(targets)
    for (_, _, view), host in zip(views, hosts, strict=True):
        if view is not host:
            view.copy_(host)


def _fragments(part: str, piece: Piece, slabs: Slabs) -> Iterator[Fragment]:
    tensor, slab = f"{part}/{piece.parameter}", slabs.get(piece.parameter)
    if slab is None:
        return iter((Fragment(tensor, piece.start, piece.numel),))
    return slab.fragments(tensor, piece.start, piece.numel)


def runs_of(pieces: Sequence[Piece], moments: Moments) -> dict[str, Tensor]:
    """Masters and moments of these pieces where they lie, joined where they are neighbours; by what each run holds."""
    return {
        f"{part}/{run.parameter}[{run.start}:] and what follows it": run.view(part, moments)
        for part in PARTS
        for run in _merge(pieces)
    }


def _merge(pieces: Sequence[Piece]) -> list[Piece]:
    """Pieces that follow one another in their master, joined; the name and start of the first stand for all."""
    merged: list[Piece] = []
    for piece in pieces:
        last = merged[-1] if merged else None
        if last is not None and last.master is piece.master and last.offset + last.numel == piece.offset:
            merged[-1] = Piece(last.parameter, last.start, last.numel + piece.numel, last.master, last.offset)
        else:
            merged.append(piece)
    return merged
