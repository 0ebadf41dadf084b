"""What a node is told to be before it joins."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from elastictrain.runtime import preflight


def test_a_sound_node_is_sound(tmp_path: Path) -> None:
    assert preflight.look(str(tmp_path), "run", time.time()) == preflight.Preflight((), ())


def test_a_wrong_clock_and_a_storage_out_of_reach_are_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = preflight.look(str(tmp_path / "file"), "run", time.time() - 3600)
    assert found.refuse == ()
    storage, clock = found.warn
    assert "can't be written" in storage
    assert "its clock is 3600 s ahead of the driver's" in clock


def test_a_node_without_the_drive_is_refused(tmp_path: Path) -> None:
    assert preflight.look(str(tmp_path), "run", time.time(), str(tmp_path)).refuse == ()
    [told] = preflight.look(str(tmp_path), "run", time.time(), str(tmp_path / "drive")).refuse
    assert told.startswith(f"its parallel.offload_path {tmp_path}/drive is no folder")


def test_one_wrong_product_shows() -> None:
    def wrong(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        product = a @ b
        product[7, 9] += 1
        return product

    assert preflight.wrong_arithmetic(np.matmul) == ""
    for _ in range(20):
        assert "multiplies wrongly" in preflight.wrong_arithmetic(wrong)
