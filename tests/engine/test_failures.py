"""Which errors mean that a peer is lost, and which are the user's own."""

from __future__ import annotations

import traceback

import pytest
import torch
import torch.distributed as dist
from ranks import Rank, run_team
from training import ignore, micro_batch, train_config, workload

from elastictrain.engine.build import build_engine
from elastictrain.engine.failures import classify, peer_loss_named
from elastictrain.engine.out_of_memory import is_out_of_memory
from elastictrain.errors import PeerLostError

BROKEN = [
    RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:41414"),
    RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1800000ms"),
    RuntimeError("Application timeout caused pair closure: gloo/transport/tcp/buffer.cc"),
    dist.DistBackendError("NCCL communicator was aborted on rank 1."),
    dist.DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed."),
    dist.DistStoreError("wait timeout after 100ms"),
]
OWN = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
    RuntimeError("CUDA out of memory"),
    ValueError("gloo/ in a message of the user's own"),
    ConnectionResetError("Connection reset by peer"),
    KeyError("tokens"),
]


@pytest.mark.parametrize("error", BROKEN, ids=str)
def test_a_broken_collective_is_a_lost_peer(error: Exception) -> None:
    lost = classify(error)
    assert isinstance(lost, PeerLostError)
    assert lost.__cause__ is error
    with pytest.raises(PeerLostError), peer_loss_named():
        raise error


@pytest.mark.parametrize("error", OWN, ids=str)
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    assert classify(error) is error
    with pytest.raises(type(error)) as caught, peer_loss_named():
        raise error
    assert caught.value is error


def test_a_failed_allocation_is_recognised() -> None:
    """The real ones of the CPU, and what CUDA and the libraries on it say."""
    for allocate in (lambda: torch.empty(1 << 60), lambda: bytearray(1 << 60)):
        with pytest.raises((RuntimeError, MemoryError)) as caught, peer_loss_named():
            allocate()
        assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not any(is_out_of_memory(error) for error in [*BROKEN, OWN[0], *OWN[2:]])


def fail_in_forward(me: Rank) -> tuple[str, list[float]]:
    """One good step; a batch that the model can't take; one good step of a new engine in the same processes."""
    config = train_config(3)
    caught, norms = "", []
    for generation, offset in enumerate((0, 10_000, 0)):
        group = me.group(generation, (0, 1))
        group.form()
        engine = build_engine(workload(config), config, config.layout(2), group)
        batches = [micro_batch(1, 3 * me.index + j) for j in range(3)]
        batches = [(seed, {"tokens": batch["tokens"] + offset}) for seed, batch in batches]
        try:
            norms.append(engine.train_step(batches, learning_rate=0.1, before_update=ignore, on_phase=ignore).grad_norm)
        except IndexError as error:
            caught = "".join(traceback.format_exception(error))
        engine.close()
        group.close()
        me.meet()
    return caught, norms


def test_an_error_of_the_model_comes_through_and_leaves_a_process_that_can_go_on() -> None:
    for caught, norms in run_team(2, fail_in_forward):
        assert "transformer.py" in caught
        assert "index out of range" in caught
        before, after = norms
        assert before == after
