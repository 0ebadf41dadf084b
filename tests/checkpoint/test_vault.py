"""What a keeper remembers, refuses and serves."""

from __future__ import annotations

import dataclasses
import threading

import pytest

from elastictrain.checkpoint.arena import Arena
from elastictrain.checkpoint.checksum import checksum
from elastictrain.checkpoint.vault import Vault
from elastictrain.errors import CheckpointError, StaleGenerationError
from elastictrain.state.tensors import Fragment, ShardHeader, ShardIndex

INDEX = ShardIndex((Fragment("param/w", 0, 16),))


def content(step: int, rank: int = 0) -> bytes:
    return bytes([step, rank]) * 32


def header(step: int, *, generation: int = 1, rank: int = 0) -> ShardHeader:
    return ShardHeader(generation, step, rank, 2, checksum(content(step, rank)), {"optimizer_step": step})


class Worker:
    """The writing side, without a thread."""

    def __init__(self, vault: Vault, generation: int = 1, rank: int = 0) -> None:
        self.vault, self.generation, self.rank = vault, generation, rank
        self.arenas = [Arena.open(t) for t in vault.attach(generation, rank, 2, INDEX)]

    def fill(self, step: int, buffer: int) -> None:
        self.arenas[buffer].buffer[:] = content(step, self.rank)

    def snapshot(self, step: int) -> None:
        self.fill(step, step % 2)
        self.vault.commit(header(step, generation=self.generation, rank=self.rank), step % 2)


def held(vault: Vault, verify: bool = True) -> list[tuple[int, int, int]]:
    return sorted((s.header.generation, s.header.rank, s.header.step) for s in vault.inventory(verify))


def put(vault: Vault, step: int, *, generation: int = 1, rank: int = 0, data: bytes | None = None) -> None:
    def fill(target: memoryview) -> None:
        target[:] = content(step, rank) if data is None else data

    vault.receive(header(step, generation=generation, rank=rank), INDEX, fill)


def test_the_last_two_steps_are_held() -> None:
    vault = Vault("node-a")
    worker = Worker(vault)
    assert held(vault) == []
    for step in (1, 2, 3):
        worker.snapshot(step)
    assert held(vault) == [(1, 0, 2), (1, 0, 3)]
    assert bytes(vault.view(1, 0, 3)) == content(3)
    stored = vault.inventory()[0]
    assert (stored.where, stored.replica, stored.index) == ("node-a", False, INDEX)
    assert bytes(Arena.open(stored.ticket).buffer) == content(stored.header.step)
    assert vault.index(1, 0) == INDEX
    with pytest.raises(CheckpointError, match="no snapshot of step 1, rank 0, generation 1 in node-a"):
        vault.view(1, 0, 1)


def test_views_can_not_be_written() -> None:
    vault = Vault("a")
    Worker(vault).snapshot(1)
    with pytest.raises(TypeError):
        vault.view(1, 0, 1)[0] = 1


def test_a_writer_that_does_not_alternate_is_refused() -> None:
    vault = Vault("a")
    worker = Worker(vault)
    worker.snapshot(1)
    vault.commit(header(1), 1)  # The same again: a repeated message.
    with pytest.raises(CheckpointError, match="wrote step 2 over step 1, its only snapshot"):
        vault.commit(header(2), 1)
    with pytest.raises(CheckpointError, match="step 1 of rank 0 is not newer than step 1"):
        vault.commit(header(1), 0)
    with pytest.raises(CheckpointError, match="rank 5 of generation 1 has no buffers"):
        vault.commit(header(1, rank=5), 0)
    with pytest.raises(CheckpointError, match="already has its buffers"):
        Worker(vault)


def test_fenced_generations_are_read_and_not_written() -> None:
    vault = Vault("a")
    worker = Worker(vault)
    worker.snapshot(1)
    put(vault, 1, rank=1)
    vault.fence(2)
    vault.fence(1)  # A late message lowers nothing.
    with pytest.raises(StaleGenerationError, match="generation 1 is fenced: 2 is the oldest allowed"):
        worker.snapshot(2)
    with pytest.raises(StaleGenerationError):
        put(vault, 2, rank=1)
    with pytest.raises(StaleGenerationError):
        Worker(vault, generation=1, rank=3)
    assert held(vault) == [(1, 0, 1), (1, 1, 1)]
    assert bytes(vault.view(1, 1, 1)) == content(1, 1)
    Worker(vault, generation=2).snapshot(2)


def test_who_takes_over_learns_of_the_newest_generation() -> None:
    vault = Vault("a")
    assert vault.newest_generation == 0
    put(vault, 1, generation=3)
    assert vault.newest_generation == 3
    vault.fence(7)
    assert vault.newest_generation == 7


def test_damage_is_left_out_and_reported_but_the_next_copy_in_progress_is_not_damage() -> None:
    reported: list[ShardHeader] = []
    vault = Vault("a", reported.append)
    worker = Worker(vault)
    worker.snapshot(1)
    worker.snapshot(2)
    worker.arenas[1].buffer[:7] = b"partial"  # Step 3 overwrites step 1.
    assert held(vault) == [(1, 0, 2)]
    assert reported == []
    worker.arenas[0].buffer[9] ^= 1
    assert held(vault) == []
    assert reported == [header(2)]
    assert held(vault, verify=False) == [(1, 0, 1), (1, 0, 2)]


def test_damage_is_logged_by_default(caplog: pytest.LogCaptureFixture) -> None:
    vault = Vault("a")
    worker = Worker(vault)
    worker.snapshot(1)
    worker.arenas[1].buffer[0] ^= 1
    assert held(vault) == []
    assert "step 1, rank 0, generation 1 is damaged" in caplog.text


def test_pinned_bytes_stay_while_training_goes_on() -> None:
    vault = Vault("a")
    worker = Worker(vault)
    for step in (1, 2):
        worker.snapshot(step)
    pinned = vault.pin(1, 0, 2)
    for step in (3, 4, 5):
        worker.snapshot(step)
    assert bytes(pinned) == content(2)
    worker.fill(6, 0)  # Not committed yet: the vault still believes in step 4.
    with pytest.raises(CheckpointError, match="step 4, rank 0 changed before it could be copied"):
        vault.pin(1, 0, 4)


def test_a_replica_counts_only_when_it_arrived_whole() -> None:
    vault = Vault("a")
    put(vault, 1)
    with pytest.raises(CheckpointError, match="step 2, rank 0 arrived damaged"):
        put(vault, 2, data=b"\1" * 64)
    assert held(vault) == [(1, 0, 1)]

    def half(target: memoryview) -> None:
        target[:30] = content(2)[:30]
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        vault.receive(header(2), INDEX, half)
    assert held(vault) == held(vault, verify=False) == [(1, 0, 1)]
    put(vault, 2)
    put(vault, 3)
    assert held(vault) == [(1, 0, 2), (1, 0, 3)]
    assert all(stored.replica for stored in vault.inventory())


def test_a_replica_that_is_held_is_not_sent_again_and_an_old_one_not_taken() -> None:
    vault = Vault("a")
    put(vault, 2)
    vault.receive(header(2), INDEX, lambda _: pytest.fail("it is held"))
    with pytest.raises(CheckpointError, match="not newer"):
        put(vault, 1)
    with pytest.raises(CheckpointError, match="kept here as another shard"):
        vault.receive(header(3), ShardIndex((Fragment("param/w", 0, 8),)), lambda _: None)
    with pytest.raises(CheckpointError, match="3 ranks in a generation of 2"):
        vault.receive(dataclasses.replace(header(3), world_size=3), INDEX, lambda _: None)


def test_a_fence_during_a_transfer_wins() -> None:
    vault = Vault("a")
    put(vault, 1)

    def fenced_meanwhile(target: memoryview) -> None:
        target[:] = content(2)
        vault.fence(2)

    with pytest.raises(StaleGenerationError):
        vault.receive(header(2), INDEX, fenced_meanwhile)
    assert held(vault) == [(1, 0, 1)]


def test_release_frees_old_generations_and_views_survive_it() -> None:
    vault = Vault("a")
    Worker(vault).snapshot(1)
    put(vault, 1, rank=1)
    Worker(vault, generation=2).snapshot(2)
    assert vault.num_bytes == 3 * 2 * INDEX.num_bytes
    view = vault.view(1, 0, 1)
    vault.release(2)
    assert vault.num_bytes == 2 * INDEX.num_bytes
    assert held(vault) == [(2, 0, 2)]
    assert bytes(view) == content(1)
    with pytest.raises(StaleGenerationError):
        put(vault, 2, rank=1)


def test_many_threads_at_once() -> None:
    vault = Vault("a")

    def use(rank: int) -> None:
        worker = Worker(vault, rank=rank)
        for step in range(1, 40):
            worker.snapshot(step)
            put(vault, step, rank=rank + 100)
            assert (1, rank, step) in held(vault)
            assert bytes(vault.pin(1, rank + 100, step)) == content(step, rank + 100)

    problems: list[BaseException] = []

    def guarded(rank: int) -> None:
        try:
            use(rank)
        except BaseException as error:  # noqa: BLE001 - raised below
            problems.append(error)

    threads = [threading.Thread(target=guarded, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert len(held(vault)) == 4 * 4
