"""Snapshots that are due to be made durable outlive those that training makes meanwhile, two of them a rank."""

from __future__ import annotations

import pytest

from elastictrain.checkpoint.arena import Arena
from elastictrain.checkpoint.checksum import checksum
from elastictrain.checkpoint.vault import Vault
from elastictrain.errors import CheckpointError
from elastictrain.runtime.copies import Copies
from elastictrain.state.tensors import Fragment, ShardHeader, ShardIndex

INDEX = ShardIndex((Fragment("param/w", 0, 16),))


def content(step: int) -> bytes:
    return bytes([step]) * INDEX.num_bytes


@pytest.fixture
def vault() -> Vault:
    return Vault("node-a")


def train(vault: Vault, copies: Copies, steps: range, every: int, generation: int = 1, rank: int = 0) -> None:
    arenas = [Arena.open(ticket) for ticket in vault.attach(generation, rank, 1, INDEX)]
    for step in steps:
        arenas[step % 2].buffer[:] = content(step)
        header = ShardHeader(generation, step, rank, 1, checksum(content(step)), {})
        vault.commit(header, step % 2)
        if step % every == 0:
            copies.add(header)


def test_the_two_newest_that_are_due_wait_for_the_writer(vault: Vault) -> None:
    copies = Copies(vault)
    train(vault, copies, range(1, 40), every=10)
    for step in (20, 30):
        assert bytes(copies.take(1, step, 0)) == content(step)
    with pytest.raises(CheckpointError, match="no snapshot of step 10"):
        copies.take(1, 10, 0)
    with pytest.raises(CheckpointError, match="no snapshot of step 30"):
        copies.take(1, 30, 0)  # taken before, and overwritten by step 32


def test_what_was_not_due_is_copied_when_it_is_asked_for(vault: Vault) -> None:
    copies = Copies(vault)
    train(vault, copies, range(1, 40), every=10)
    assert bytes(copies.take(1, 39, 0)) == content(39)


def test_those_of_a_newer_generation_and_of_other_ranks_count_by_themselves(vault: Vault) -> None:
    copies = Copies(vault)
    train(vault, copies, range(1, 40), every=10)
    train(vault, copies, range(1, 40), every=10, rank=1)
    train(vault, copies, range(25, 40), every=10, generation=2)
    assert bytes(copies.take(2, 30, 0)) == content(30)
    assert bytes(copies.take(1, 30, 0)) == content(30)
    assert bytes(copies.take(1, 20, 1)) == content(20)
    copies.clear()
    with pytest.raises(CheckpointError):
        copies.take(1, 30, 1)
