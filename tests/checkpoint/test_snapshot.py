"""The worker's writer: off the training thread, in order, and honest about failure."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from elastictrain.checkpoint.snapshot import Held, SnapshotWriter
from elastictrain.checkpoint.vault import Vault
from elastictrain.errors import StaleGenerationError
from elastictrain.state.tensors import Fragment, ShardHeader, ShardIndex

INDEX = ShardIndex((Fragment("param/w", 0, 64),))


class Keeper:
    """A vault and the callback that tells it; `gate` stands for the buddy."""

    def __init__(self) -> None:
        self.vault = Vault("node")
        self.gate = threading.Event()
        self.gate.set()
        self.commits: list[tuple[ShardHeader, int]] = []

    def committed(self, header: ShardHeader, buffer: int) -> Held:
        self.vault.commit(header, buffer)
        self.commits.append((header, buffer))
        return lambda: None if self.gate.wait(30) else pytest.fail("no buddy")

    def writer(self, generation: int = 1) -> SnapshotWriter:
        tickets = self.vault.attach(generation, 0, 1, INDEX)
        return SnapshotWriter(tickets, generation, 0, 1, self.committed)


def of(step: int) -> Callable[[memoryview], None]:
    def export(target: memoryview) -> None:
        target[:] = bytes([step]) * len(target)

    return export


def test_snapshots_alternate_and_are_what_was_exported() -> None:
    keeper = Keeper()
    writer = keeper.writer()
    for step in (1, 2, 3):
        writer.begin(step, of(step), {"optimizer_step": step})
        assert writer.wait() >= 0
    writer.close()
    assert [(h.step, h.scalars["optimizer_step"], buffer) for h, buffer in keeper.commits] == [
        (1, 1, 0),
        (2, 2, 1),
        (3, 3, 0),
    ]
    assert sorted(s.header.step for s in keeper.vault.inventory()) == [2, 3]
    assert bytes(keeper.vault.view(1, 0, 3)) == bytes([3]) * 256


def test_the_export_runs_while_training_does() -> None:
    keeper = Keeper()
    writer = keeper.writer()
    trained = threading.Event()

    def export(target: memoryview) -> None:
        assert trained.wait(30)
        of(1)(target)

    writer.begin(1, export, {})
    trained.set()  # begin has returned, though the export has not.
    writer.wait()
    assert [h.step for h, _ in keeper.commits] == [1]
    writer.close()


def test_the_next_snapshot_waits_for_the_buddy() -> None:
    keeper = Keeper()
    writer = keeper.writer()
    keeper.gate.clear()
    writer.begin(1, of(1), {})
    exported = threading.Event()
    training = threading.Thread(target=lambda: writer.begin(2, lambda _: exported.set(), {}))
    training.start()
    assert not exported.wait(0.1)
    keeper.gate.set()
    assert exported.wait(30)
    training.join()
    writer.wait()
    writer.close()


def test_scalars_are_those_of_the_moment() -> None:
    keeper = Keeper()
    writer = keeper.writer()
    scalars = {"optimizer_step": 1}
    writer.begin(1, of(1), scalars, "what else belongs to it")
    scalars["optimizer_step"] = 2
    writer.wait()
    header, _ = keeper.commits[0]
    assert (header.scalars, header.note) == ({"optimizer_step": 1}, "what else belongs to it")
    writer.close()


def test_failures_surface_in_wait_and_stay() -> None:
    keeper = Keeper()
    writer = keeper.writer()

    def broken(_: memoryview) -> None:
        raise ZeroDivisionError("no such tensor")

    writer.begin(1, broken, {})
    for _ in range(2):
        with pytest.raises(ZeroDivisionError, match="no such tensor"):
            writer.wait()
    with pytest.raises(ZeroDivisionError):
        writer.begin(2, of(2), {})
    writer.close()
    assert keeper.vault.inventory(verify=False) == []


def test_a_fenced_writer_hears_of_it() -> None:
    keeper = Keeper()
    writer = keeper.writer()
    keeper.vault.fence(2)
    writer.begin(1, of(1), {})
    with pytest.raises(StaleGenerationError):
        writer.wait()
    writer.close()


def test_close_offers_the_copy_in_progress_and_is_not_held_up_by_a_dead_buddy() -> None:
    keeper = Keeper()
    writer = keeper.writer()
    keeper.gate.clear()
    writer.begin(1, of(1), {})
    writer.close()
    writer.close()
    assert [s.header.step for s in keeper.vault.inventory()] == [1]
    keeper.gate.set()
    writer.wait()
    with pytest.raises(ValueError, match="closed"):
        writer.begin(2, of(2), {})
