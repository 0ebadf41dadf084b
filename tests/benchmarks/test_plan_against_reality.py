"""The planner's memory against real ranks, for one layout of each kind; `benchmarks/plan_memory.py` has many more."""

import pytest
import torch
from plan_memory import CASES, Case, compare
from plan_time import kendall_tau
from tensor_memory import TensorMemory

from elastictrain.config import TrainConfig
from elastictrain.plan.activations import micro_batch_bytes
from elastictrain.plan.space import RECOMPUTES
from elastictrain.plan.zero_memory import LIVE_PARAMETERS, PERSISTENT_ELEMENTS
from elastictrain.planning import job_of
from elastictrain.workloads.transformer import Transformer, rotary_table

CHOSEN = (
    Case("wide", "fp32", 1, 2, 2),
    Case("wide", "bf16", 2, 2, 4, recompute="full"),
    Case("wide", "fp32", 3, 2, 4, 1),
    Case("tiny", "fp32", 0, 2, 8, 4, pp=2, vocab_size=8192),
    Case("wide", "bf16", 1, 2, 4, tp=2, recompute="selective"),
)


@pytest.mark.parametrize("case", CHOSEN, ids=lambda case: f"{case.dtype} zero{case.zero_stage} pp{case.pp} tp{case.tp}")
def test_memory_is_estimated_within_a_tenth(case: Case) -> None:
    row = compare(case)
    assert abs(row["error"]) < 0.10, row


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("more", [{"dropout": 0.1}, {"num_kv_heads": 1}, {"num_experts": 4}], ids=str)
def test_a_block_that_is_recomputed_selectively_keeps_what_is_estimated(more: dict[str, object], dtype: str) -> None:
    model = {"num_layers": 2, "hidden_size": 64, "num_heads": 4, **more}
    config = TrainConfig.from_dict({"model": model, "data": {"seq_len": 24, "vocab_size": 301}})
    shape, torch_dtype = job_of(config).shape, {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    block = Transformer(config.model, config.data.vocab_size, "selective").blocks["0"].to(torch_dtype)
    rotation = rotary_table(shape.seq_len, block.attention.head_dim, 1e4, torch.device("cpu"))
    hidden = torch.randn(4, shape.seq_len, 64, dtype=torch_dtype, requires_grad=True)
    with TensorMemory() as memory:
        block(hidden, rotation)  # from now on it knows the weights
        memory.reset_peak()
        before = memory.live_bytes
        passed_on = block(hidden, rotation)
        memory.reset_peak()
    kept = hidden.nbytes + memory.live_bytes - before - sum(x.nbytes for x in passed_on)
    estimate = micro_batch_bytes(shape, dtype, 4 * shape.seq_len, num_layers=1, recompute="selective")
    assert estimate.layers == pytest.approx(kept, rel=0.05)


def test_the_benchmark_covers_all_that_the_engine_runs() -> None:
    kinds = {(case.dtype, case.zero_stage) for case in CASES}
    assert kinds == {(dtype, stage) for dtype in ("fp32", "bf16") for stage in range(4)}
    assert {(case.pp > 1, case.tp > 1) for case in CASES} == {(a, b) for a in (False, True) for b in (False, True)}
    assert {case.world_size for case in CASES} == {1, 2, 4}
    assert {case.recompute for case in CASES} == set(RECOMPUTES)


def test_deepspeeds_thresholds_are_those_that_the_planner_takes() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    defaults = DeepSpeedZeroConfig(stage=3)
    assert defaults.param_persistence_threshold == PERSISTENT_ELEMENTS
    assert defaults.max_live_parameters == LIVE_PARAMETERS


def test_tensors_are_counted_while_they_live_and_views_not_at_all() -> None:
    with TensorMemory() as memory:
        first = torch.zeros(1000)
        view = first.view(10, 100) + torch.ones(10, 100)
        del first
        memory.reset_peak()
        assert memory.peak_bytes == memory.live_bytes == 4000
        torch.zeros(500)
        assert memory.peak_bytes == 6000
        assert view.sum() == 1000
    memory.reset_peak()
    assert memory.live_bytes == 4000


def test_kendall_tau() -> None:
    assert kendall_tau([1, 2, 3], [10, 20, 30]) == 1
    assert kendall_tau([1, 2, 3], [30, 20, 10]) == -1
    assert kendall_tau([1, 3, 2], [1, 2, 3]) == pytest.approx(1 / 3)
