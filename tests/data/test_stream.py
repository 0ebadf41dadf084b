"""A rank's stream: the right tokens for every step, from any step, and errors where they belong."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from elastictrain.data.manifest import Manifest
from elastictrain.data.order import SampleOrder
from elastictrain.data.shards import TokenShards
from elastictrain.data.stream import SampleStream
from elastictrain.errors import DataError
from elastictrain.plan.layout import Layout, plan_layout


def layout(world_size: int) -> Layout:
    return plan_layout(world_size, global_batch=12, micro_batch=2, zero_stage=1)


def order(manifest: Manifest) -> SampleOrder:
    return SampleOrder(manifest.num_samples, 3)


def global_batches(manifest: Manifest, world_size: int, first_step: int, num_steps: int) -> list[torch.Tensor]:
    """What all ranks of one generation read, put together in global order."""
    steps: list[dict[int, torch.Tensor]] = [{} for _ in range(num_steps)]
    for rank in range(world_size):
        with SampleStream(TokenShards(manifest), order(manifest), layout(world_size), rank, first_step) as stream:
            for step in steps:
                for micro_batch, tokens in next(stream):
                    assert tokens.shape == (2, manifest.seq_len + 1)
                    step[micro_batch.global_index] = tokens
    return [torch.cat([step[g] for g in range(6)]) for step in steps]


def test_each_step_has_the_tokens_of_its_samples(manifest: Manifest) -> None:
    shards = TokenShards(manifest)
    batches = global_batches(manifest, 1, 5, 8)
    for step, batch in enumerate(batches, start=5):
        assert torch.equal(batch, shards.read(order(manifest).step_samples(step, 12)))


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_a_world_of_any_size_reads_the_same(manifest: Manifest, world_size: int) -> None:
    for mine, single in zip(global_batches(manifest, world_size, 9, 4), global_batches(manifest, 1, 9, 4), strict=True):
        assert torch.equal(mine, single)


def test_it_begins_anywhere(manifest: Manifest) -> None:
    far = 10**12
    (batch,) = global_batches(manifest, 2, far, 1)
    assert torch.equal(batch, TokenShards(manifest).read(order(manifest).step_samples(far, 12)))


def test_it_loads_ahead_no_more_than_it_may(manifest: Manifest) -> None:
    loaded = threading.Semaphore(0)
    steps = []

    class Counted(TokenShards):
        def read(self, samples):  # type: ignore[no-untyped-def]  # a stand-in
            steps.append(samples)
            loaded.release()
            return super().read(samples)

    with SampleStream(Counted(manifest), order(manifest), layout(6), 0, 1, prefetch=3) as stream:
        for _ in range(3):
            assert loaded.acquire(timeout=30)
        assert len(steps) == 3
        next(stream)
        assert loaded.acquire(timeout=30)
        assert len(steps) == 4
        assert stream.last_wait_s >= 0


def test_closing_ends_the_thread_and_the_iteration(manifest: Manifest) -> None:
    before = threading.active_count()
    stream = SampleStream(TokenShards(manifest), order(manifest), layout(1), 0, 1)
    next(stream)
    assert threading.active_count() == before + 1
    stream.close()
    stream.close()
    assert threading.active_count() == before
    assert list(stream) == []


def test_an_error_while_loading_surfaces(manifest: Manifest, tmp_path: Path) -> None:
    for shard in manifest.train:
        (tmp_path / shard.name).write_bytes(bytes(shard.num_bytes))
    damaged = TokenShards(replace(manifest, folder=tmp_path))
    with (
        SampleStream(damaged, order(manifest), layout(1), 0, 1) as stream,
        pytest.raises(DataError, match="can't read the token shard"),
    ):
        next(stream)
