"""What ranks export of a replicated state covers it exactly once, whatever the sizes."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from elastictrain.engine.transfer import ShardExporter
from elastictrain.engine.zero_state import Piece, share
from elastictrain.state.tensors import PARTS


@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.integers(1, 12))
def test_shares_cover_every_element_exactly_once_in_equal_parts(sizes: list[int], world_size: int) -> None:
    pieces = [Piece(f"p{i}", 0, n, torch.empty(n), 0) for i, n in enumerate(sizes)]
    shares = [share(pieces, rank, world_size) for rank in range(world_size)]
    covered = [(p.parameter, at) for mine in shares for p in mine for at in range(p.start, p.start + p.numel)]
    assert covered == [(p.parameter, at) for p in pieces for at in range(p.numel)]
    numels = [sum(p.numel for p in mine) for mine in shares]
    assert max(numels) - min(numels) <= 1


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 3)), min_size=1, max_size=8))
def test_a_shard_holds_the_fragments_end_to_end_in_index_order(layout: list[tuple[int, int]]) -> None:
    """Pieces in one master with gaps (padding) between some of them."""
    master = torch.arange(float(sum(n + gap for n, gap in layout)))
    pieces, offset = [], 0
    for i, (numel, gap) in enumerate(layout):
        pieces.append(Piece(f"p{i}", 0, numel, master, offset))
        offset += numel + gap
    moments = {master: {"exp_avg": master + 1000, "exp_avg_sq": master + 2000}}
    exporter = ShardExporter(pieces, moments, {})
    buffer = torch.full((exporter.index.numel,), torch.nan)
    exporter.copy_into(buffer)
    fragments = list(zip(exporter.index.fragments, exporter.index.offsets, strict=True))
    assert [f.tensor for f, _ in fragments] == [f"{part}/{p.parameter}" for part in PARTS for p in pieces]
    for (fragment, at), piece in zip(fragments, pieces * 3, strict=True):
        shift = 1000.0 * PARTS.index(fragment.tensor.split("/")[0])
        expected = torch.arange(float(piece.offset), float(piece.offset + piece.numel)) + shift
        assert torch.equal(buffer[at : at + fragment.numel], expected)
