"""Any layout to any other: the same bits, in memory and through files, and proof that nothing is missing."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastictrain.checkpoint.source import Reads, ShardedSource
from elastictrain.checkpoint.store import CheckpointStore
from elastictrain.errors import CheckpointError
from elastictrain.state.manifest import Manifest
from elastictrain.state.reshard import plan_copies
from elastictrain.state.tensors import BYTES_PER_ELEMENT, Fragment, LogicalTensor, ShardIndex
from elastictrain.storage import Storage

shapes = st.lists(st.lists(st.integers(0, 6), max_size=3).map(tuple), min_size=1, max_size=5)


@st.composite
def layouts(draw: st.DrawFn, tensors: list[LogicalTensor], *, replicas: bool = False) -> dict[int, ShardIndex]:
    """Every tensor cut anywhere, the pieces dealt to any rank in any order; some held twice where that is asked for."""
    world_size = draw(st.integers(1, 4))
    dealt: list[list[Fragment]] = [[] for _ in range(world_size)]
    for tensor in tensors:
        cuts = sorted({0, tensor.numel, *draw(st.lists(st.integers(0, tensor.numel), max_size=4))})
        pieces = [Fragment(tensor.name, a, b - a) for a, b in pairwise(cuts)] or [Fragment(tensor.name, 0, 0)]
        for piece in pieces:
            owners = draw(st.sets(st.integers(0, world_size - 1), min_size=1, max_size=2 if replicas else 1))
            for owner in owners:
                dealt[owner].append(piece)
    return {rank: ShardIndex(tuple(draw(st.permutations(pieces)))) for rank, pieces in enumerate(dealt)}


@st.composite
def states(draw: st.DrawFn) -> dict[str, np.ndarray]:
    """Tensors whose elements are all different bit patterns, NaNs among them."""
    arrays = {}
    offset = draw(st.integers(0, 2**32 - 2000))
    for number, shape in enumerate(draw(shapes)):
        size = int(np.prod(shape, dtype=int))
        arrays[f"param/{number}"] = np.arange(offset, offset + size, dtype=np.uint32).view(np.float32).reshape(shape)
        offset += size
    return arrays


def tensors_of(arrays: dict[str, np.ndarray]) -> list[LogicalTensor]:
    return [LogicalTensor(name, array.shape) for name, array in arrays.items()]


def shard_bytes(arrays: dict[str, np.ndarray], index: ShardIndex) -> bytes:
    return b"".join(arrays[f.tensor].reshape(-1)[f.start : f.stop].tobytes() for f in index.fragments)


def memory_reader(shards: dict[int, bytes]) -> Callable[[int, Reads], None]:
    def read(number: int, reads: Reads) -> None:
        for offset, view in reads:
            start = offset * BYTES_PER_ELEMENT
            view[:] = shards[number][start : start + len(view)]

    return read


def gather(source: object, index: ShardIndex) -> bytes:
    """The shard of another layout, filled from the source."""
    buffer = memoryview(bytearray(index.num_bytes))
    views = [buffer[4 * o : 4 * (o + f.numel)] for f, o in zip(index.fragments, index.offsets, strict=True)]
    source.fill(list(zip(index.fragments, views, strict=True)))
    return bytes(buffer)


@settings(deadline=None)
@given(st.data())
def test_any_layout_to_any_other_and_back_is_bit_for_bit(data: st.DataObject) -> None:
    arrays = data.draw(states())
    old = data.draw(layouts(tensors_of(arrays), replicas=True))
    new = data.draw(layouts(tensors_of(arrays)))
    stored = {rank: shard_bytes(arrays, index) for rank, index in old.items()}
    moved = {rank: gather(ShardedSource({}, old, memory_reader(stored)), index) for rank, index in new.items()}
    assert moved == {rank: shard_bytes(arrays, index) for rank, index in new.items()}
    back = {rank: gather(ShardedSource({}, new, memory_reader(moved)), index) for rank, index in old.items()}
    assert back == stored


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_through_files_too(data: st.DataObject) -> None:
    arrays = data.draw(states())
    old = data.draw(layouts(tensors_of(arrays)))
    new = data.draw(layouts(tensors_of(arrays)))
    with tempfile.TemporaryDirectory() as folder:
        store = CheckpointStore(Storage.open(folder))
        entries = [store.write_shard(1, r, len(old), i, shard_bytes(arrays, i)) for r, i in old.items()]
        tensors = tuple(tensors_of(arrays))
        manifest = Manifest("demo", 1, 16, "", 1.0, {}, {"optimizer_step": 1}, tensors, tuple(entries), 1e9)
        assert Manifest.from_json(manifest.to_json()) == manifest
        assert store.verify(store.commit(manifest).step).manifest == manifest
        for index in new.values():
            assert gather(store.open(1), index) == shard_bytes(arrays, index)


@settings(deadline=None)
@given(st.data())
def test_a_plan_writes_each_wanted_element_once_from_where_it_is(data: st.DataObject) -> None:
    tensors = [LogicalTensor(f"param/{n}", shape) for n, shape in enumerate(data.draw(shapes))]
    shards = data.draw(layouts(tensors, replicas=True))
    fragments = []
    for tensor in tensors:
        start = data.draw(st.integers(0, tensor.numel))
        fragments.append(Fragment(tensor.name, start, data.draw(st.integers(0, tensor.numel - start))))
    where = {
        (rank, offset + n): (fragment.tensor, fragment.start + n)
        for rank, index in shards.items()
        for fragment, offset in zip(index.fragments, index.offsets, strict=True)
        for n in range(fragment.numel)
    }
    written: Counter[tuple[int, int]] = Counter()
    for copy in plan_copies(shards, fragments):
        for n in range(copy.numel):
            target = fragments[copy.target]
            assert where[copy.shard, copy.source_offset + n] == (target.tensor, target.start + copy.target_offset + n)
            written[copy.target, copy.target_offset + n] += 1
    assert written == Counter({(t, n): 1 for t, fragment in enumerate(fragments) for n in range(fragment.numel)})


@settings(deadline=None)
@given(st.data())
def test_a_hole_is_never_planned_over(data: st.DataObject) -> None:
    tensors = [LogicalTensor(f"param/{n}", shape) for n, shape in enumerate(data.draw(shapes))]
    shards = data.draw(layouts(tensors))
    full = [(rank, n) for rank, index in shards.items() for n, f in enumerate(index.fragments) if f.numel]
    if not full:
        return
    rank, number = data.draw(st.sampled_from(full))
    lost = shards[rank].fragments[number]
    shards[rank] = ShardIndex(tuple(f for n, f in enumerate(shards[rank].fragments) if n != number))
    with pytest.raises(CheckpointError, match=rf"no shard holds {lost.tensor}\[{lost.start}:"):
        plan_copies(shards, [Fragment(tensor.name, 0, tensor.numel) for tensor in tensors])
