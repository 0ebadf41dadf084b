"""Shares of a matrix are all of it, each element once, wherever ZeRO cuts them."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from elastictrain.plan.part import Part
from elastictrain.state.slab import Slab


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 1), st.integers(1, 4), st.data())
def test_shares_of_a_matrix_are_the_matrix(rows: int, columns: int, split: int, tp: int, data: st.DataObject) -> None:
    shape = (rows, columns)
    if shape[split] < tp:
        return
    whole = np.arange(rows * columns).reshape(shape)
    found = []
    for index in range(tp):
        share = Part(range(0), True, True, tp, index).share(shape[split])
        local = whole[share.start : share.stop] if split == 0 else whole[:, share.start : share.stop]
        slab = Slab.of(shape, split, share)
        cut = data.draw(st.integers(0, local.size))
        pieces = [*slab.fragments("w", 0, cut), *slab.fragments("w", cut, local.size - cut)]
        assert all(piece.tensor == "w" and piece.numel > 0 for piece in pieces)
        told = [element for piece in pieces for element in range(piece.start, piece.stop)]
        assert told == local.reshape(-1).tolist()
        found += told
    assert sorted(found) == list(range(rows * columns))


def test_a_share_of_rows_is_one_fragment() -> None:
    assert len([*Slab.of((8, 4), 0, range(2, 6)).fragments("w", 0, 16)]) == 1
    assert len([*Slab.of((8, 4), 1, range(2, 4)).fragments("w", 0, 16)]) == 8
