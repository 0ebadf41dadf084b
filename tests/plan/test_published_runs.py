"""The time model against runs that others published: one set of shares of the stated speeds for all of them.

- Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM"
  (arXiv:2104.04473), Table 1: GPT models on A100s, sequence 2048, vocabulary 51,200, activations recomputed; teraFLOP/s
  a GPU by their formula, which counts what is recomputed. The table states no micro-batches: the fastest that fits.
- Grattafiori et al. 2024, "The Llama 3 Herd of Models" (arXiv:2407.21783), Table 4: the 405B model on H100s; teraFLOP/s
  a GPU. Their pipeline is interleaved, one layer a chunk (section 3.3.2), about 8 chunks a stage.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from elastictrain.machines import read_cluster
from elastictrain.plan.memory import memory_of
from elastictrain.plan.model_shape import ModelShape
from elastictrain.plan.space import Candidate
from elastictrain.plan.step_time import step_time

CLUSTERS = Path(__file__).parents[2] / "clusters/hardware"
WITHIN = 0.15

# billions of parameters, heads, hidden size, layers, tp, pp, GPUs, global batch, teraFLOP/s a GPU
MEGATRON = [
    (1.7, 24, 2304, 24, 1, 1, 32, 512, 137),
    (3.6, 32, 3072, 30, 2, 1, 64, 512, 138),
    (7.5, 32, 4096, 36, 4, 1, 128, 512, 142),
    (18.4, 48, 6144, 40, 8, 1, 256, 1024, 135),
    (39.1, 64, 8192, 48, 8, 2, 512, 1536, 138),
    (76.1, 80, 10240, 60, 8, 4, 1024, 1792, 140),
    (145.6, 96, 12288, 80, 8, 8, 1536, 2304, 148),
    (310.1, 128, 16384, 96, 8, 16, 1920, 2160, 155),
    (529.6, 128, 20480, 105, 8, 35, 2520, 2520, 163),
    (1008.0, 160, 25600, 128, 8, 64, 3072, 3072, 163),
]

# tp, context parallel, pp, dp, sequence, sequences a data-parallel rank, teraFLOP/s a GPU
LLAMA = [
    (8, 1, 16, 64, 8192, 32, 430),
    (8, 1, 16, 128, 8192, 16, 400),
    (8, 16, 16, 8, 131_072, 16, 380),
]


@pytest.mark.parametrize("row", MEGATRON, ids=lambda row: f"{row[0]}B")
def test_megatron_lm(row: tuple[float, ...]) -> None:
    billions, heads, hidden, layers, tp, pp, gpus, batch, published = row
    heads, hidden, layers, tp, pp, gpus, batch = map(int, (heads, hidden, layers, tp, pp, gpus, batch))
    shape = ModelShape(
        layers, hidden, heads, heads, 4 * hidden, vocab_size=51_200, seq_len=2048, dropout=True, gated_mlp=False,
        biases=True, learned_positions=True, skips_masked=False,
    )  # fmt: skip
    assert shape.num_parameters / 1e9 == pytest.approx(billions, abs=0.05)
    cluster = read_cluster(CLUSTERS / "a100x8.yaml")
    dp = gpus // tp // pp
    candidates = [
        Candidate(dp, m, batch // dp // m, 1, pp=pp, tp=tp, activation_checkpointing="full")
        for m in (1, 2, 4, 8, 16)
        if batch % (dp * m) == 0
    ]
    fitting = [
        c for c in candidates if memory_of(shape, "bf16", c, cluster.device).device_bytes < cluster.device.memory_bytes
    ]
    step_s = min(step_time(shape, "bf16", c, cluster).step_s for c in fitting)
    flops = shape.flops_per_token(recompute=True) * batch * shape.seq_len
    assert flops / step_s / gpus / 1e12 == pytest.approx(published, rel=WITHIN)


@pytest.mark.parametrize("row", LLAMA, ids=["8192 GPUs", "16384 GPUs", "long context"])
def test_llama_3(row: tuple[int, ...]) -> None:
    tp, sp, pp, dp, seq_len, share, published = row
    shape = ModelShape(126, 16_384, 128, 8, 53_248, vocab_size=128_256, seq_len=seq_len, tie_embeddings=False)
    assert shape.num_parameters == pytest.approx(405e9, rel=0.005)
    cluster = read_cluster(CLUSTERS / "h100x8.yaml")
    candidate = Candidate(dp, 1, share, 1, pp=pp, tp=tp, sp=sp)
    step_s = step_time(shape, "bf16", candidate, cluster, chunks=8).step_s
    flops = shape.flops_per_token(causal=True) * candidate.global_batch * seq_len
    assert flops / step_s / candidate.world_size / 1e12 == pytest.approx(published, rel=WITHIN)
