"""Which updates count when collectives of nccl are broken; the device's side is a flag here."""

from __future__ import annotations

import pytest

from elastictrain.engine.update_fence import UpdateFence
from elastictrain.errors import PeerLostError


class Device:
    """Has done what is enqueued when it is told so."""

    def __init__(self) -> None:
        self.idle = True

    def record(self) -> None:
        self.idle = False

    def query(self) -> bool:
        return self.idle


def fence_after(num_updates: int) -> tuple[UpdateFence, Device]:
    device = Device()
    updates = UpdateFence(device)
    for _ in range(num_updates):
        updates.mark()
    return updates, device


def test_without_a_fence_every_update_counts() -> None:
    updates, _ = fence_after(3)
    updates.check()


def test_an_update_that_was_done_counts_after_the_fence() -> None:
    updates, device = fence_after(2)
    device.idle = True
    updates.fence()
    updates.check()


def test_an_update_under_way_does_not_count_though_it_is_done_later() -> None:
    updates, device = fence_after(2)
    updates.fence()
    device.idle = True
    with pytest.raises(PeerLostError, match="may be wrong"):
        updates.check()


def test_no_later_update_counts_nor_a_later_fence() -> None:
    updates, device = fence_after(2)
    device.idle = True
    updates.fence()
    updates.mark()
    device.idle = True
    updates.fence()  # what is done by now was done after the collectives broke
    with pytest.raises(PeerLostError, match="may be wrong"):
        updates.check()
