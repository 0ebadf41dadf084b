"""A state is read whole from shards wherever they lie."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from elastictrain.checkpoint.arena import Arena
from elastictrain.checkpoint.replicate import ReplicaServer
from elastictrain.checkpoint.source import LocatedShard, ShardedSource, memory_source
from elastictrain.checkpoint.vault import Vault
from elastictrain.errors import CheckpointError, InfrastructureError
from elastictrain.state.tensors import Fragment, ShardIndex

TOKEN = b"t" * 32


def remember(vault: Vault, state, rank: int, world_size: int, step: int = 1) -> None:
    index = state.index(rank, world_size)
    tickets = vault.attach(1, rank, world_size, index)
    Arena.open(tickets[0]).buffer[:] = state.shard(index)
    vault.commit(state.header(index, rank, world_size, step), 0)


def test_from_this_node_and_another_one(state) -> None:
    here, there = Vault("here"), Vault("there")
    remember(here, state, 0, 3)
    remember(here, state, 1, 3)
    remember(there, state, 2, 3)
    server = ReplicaServer(there, "127.0.0.1", TOKEN)
    shards = [LocatedShard(s, None) for s in here.inventory()]
    shards += [LocatedShard(s, server.address) for s in there.inventory()]
    source = memory_source(shards, TOKEN, timeout_s=5)
    assert state.equals(state.read_from(source))
    assert source.scalars == {"optimizer_step": 1, "loss_scale": 0.1}

    part = np.zeros(6, np.float32)
    source.fill([(Fragment("param/a", 20, 6), memoryview(part)), (Fragment("param/a", 0, 0), memoryview(bytearray()))])
    assert np.array_equal(part, state.arrays["param/a"].reshape(-1)[20:26])
    server.close()
    with pytest.raises(InfrastructureError, match="lost the keeper"):
        state.read_from(source)


def test_a_missing_shard_is_named(state) -> None:
    vault = Vault("here")
    remember(vault, state, 0, 2)
    with pytest.raises(CheckpointError, match=r"no shard holds param/a\[17:35\]"):
        state.read_from(memory_source([LocatedShard(s, None) for s in vault.inventory()], TOKEN))


def test_shards_of_different_steps_are_no_state(state) -> None:
    vault = Vault("here")
    remember(vault, state, 0, 2, step=1)
    remember(vault, state, 1, 2, step=2)
    with pytest.raises(CheckpointError, match=r"\[\(1, 1\), \(1, 2\)\]"):
        memory_source([LocatedShard(s, None) for s in vault.inventory()], TOKEN)
    with pytest.raises(CheckpointError, match=r"\[\]"):
        memory_source([], TOKEN)


def test_reads_are_grouped_by_shard_and_only_what_is_asked(state) -> None:
    calls: list[tuple[int, list[tuple[int, int]]]] = []
    shards = {rank: state.index(rank, 3) for rank in range(3)}
    source = ShardedSource({}, shards, lambda n, reads: calls.append((n, [(o, len(v)) for o, v in reads])))
    source.fill(
        [(Fragment("param/a", 0, 13), memoryview(bytearray(52))), (Fragment("param/b", 0, 1), memoryview(bytearray(4)))]
    )
    a_of_second = 0
    b_of_first = next(o for f, o in zip(shards[0].fragments, shards[0].offsets, strict=True) if f.tensor == "param/b")
    assert calls == [(0, [(0, 44), (b_of_first, 4)]), (1, [(a_of_second, 8)])]


def test_buffers_that_do_not_fit_are_refused(state) -> None:
    source = ShardedSource({}, {0: state.index(0, 1)}, lambda *_: None)
    for view in (memoryview(bytearray(4)), memoryview(bytes(8)), memoryview(np.zeros(4, np.float32))[::2]):
        with pytest.raises(ValueError, match="writable contiguous buffer of 8 bytes"):
            source.fill([(Fragment("param/b", 0, 2), view)])


def test_a_shard_whose_keeper_is_gone(state) -> None:
    vault = Vault("here")
    remember(vault, state, 0, 1)
    stored = vault.inventory()[0]
    gone = dataclasses.replace(stored, ticket=dataclasses.replace(stored.ticket, pid=2**22 + 1))
    with pytest.raises(InfrastructureError, match="is gone"):
        state.read_from(memory_source([LocatedShard(gone, None)], TOKEN))


def test_empty_shards_are_fine(state) -> None:
    vault = Vault("here")
    remember(vault, state, 0, 1)
    vault.attach(1, 1, 1, ShardIndex(()))
    assert state.equals(state.read_from(memory_source([LocatedShard(s, None) for s in vault.inventory()], TOKEN)))
