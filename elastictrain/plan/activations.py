"""Bytes that the forward pass leaves for the backward pass (pure).

The method is that of Korthikanti et al. 2022 ("Reducing Activation Recomputation in Large Transformer Models",
arXiv:2205.05198, section 4): go through a layer and add up what autograd keeps. Their 34 sbh + 5 as^2 b is for
LayerNorm, GELU, dropout and plain attention; here the layer has RMSNorm in fp32, rotary embeddings, grouped-query
attention through `scaled_dot_product_attention` (which keeps one number a head and token instead of the scores), and
SwiGLU. Counted per token, with e bytes an element, h wide, q and k wide queries and keys, f wide inside the MLP, n
heads (tested against autograd):

    each norm         8 h + 4         its fp32 input, the normed copy before the weight, the root
                      e h             its output, which the next matrices need
    attention         e (q + 2 k)     rotated queries, keys and values
                      2 e q + 4 n     the mix, as it came and as the output projection needs it; log-sum-exp a head
    SwiGLU            4 e f           gate, silu of it, up, their product
    dropout, if any   2 e h           masks
    experts, if any   4 e f s         as SwiGLU, for each of s places a token (choices x capacity factor)
                      e h (s + c)     what goes in at s places, and what comes out for c choices
                      4 n             n probabilities; in bf16 also 4 h, their fp32 input

With full activation checkpointing a layer keeps its input, e h, and one layer at a time is recomputed. Selective, it
keeps the norms' inputs instead of what norms make, one copy of the mix, and of SwiGLU gate and up:

    norms             2 e h           of 16 h + 8 + 2 e h
    mix               e q             of 2 e q
    SwiGLU, experts   2 e f, 2 e f s  of 4 e f, 4 e f s

and at the worst moment of the backward pass it has the silu of the gate and the output of a norm again.

The loss, over the vocabulary in fp32, is the peak of most models: log-probabilities, their gradient and that of the
logits at once. A loss that is streamed (`workloads.head_loss`) holds some rows of scores (`scored_at_once`), and the
gradients of the vectors and of the head's weight instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from elastictrain.plan.layout import Recompute
from elastictrain.plan.model_shape import ModelShape

FP32 = 4
MOST_EXCHANGES = 16
"""Times that ranks which share the vocabulary put a streamed loss together: each costs a collective's latency."""
BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes of one micro-batch on one rank, in one pipeline stage."""

    layers: int
    """Kept by all its layers from forward to backward."""
    working: int
    """On top of that while one layer goes backward; with checkpointing, what is recomputed included."""
    head: int
    """Kept by the final norm and the loss, and given up before any layer goes backward."""
    loss: int
    """On top of that at the loss's own peak."""


def layer_bytes(shape: ModelShape, dtype: str, tokens: int, tp: int = 1) -> int:
    """Kept by one layer of `tokens` tokens; what tp splits is split, norms and their outputs are not."""
    e, h = BYTES[dtype], shape.hidden_size
    norms = 2 * (2 * FP32 * h + FP32 + e * h)
    heads = e * (3 * shape.query_size + 2 * shape.kv_size) + FP32 * shape.num_heads
    mlp = e * (4 if shape.gated_mlp else 2) * shape.intermediate_size * shape.expert_room
    routed = 0.0
    if shape.num_experts > 1:
        routed = e * h * (shape.expert_room + shape.experts_per_token) + FP32 * shape.num_experts
        routed += FP32 * h * (e < FP32)
    dropout = 2 * e * h if shape.dropout else 0
    return int(tokens * (norms + (heads + mlp) / tp + routed + dropout))


def made_again_bytes(shape: ModelShape, dtype: str, tokens: int, tp: int = 1) -> int:
    """Of `layer_bytes`, what selective recomputation does not keep."""
    e, h = BYTES[dtype], shape.hidden_size
    norms = 2 * (2 * FP32 * h + FP32 + e * h) - 2 * e * h
    mix = e * shape.query_size
    mlp = e * (2 if shape.gated_mlp else 1) * shape.intermediate_size * shape.expert_room
    return int(tokens * (norms + (mix + mlp) / tp))


def scored_at_once(tokens: int, hidden_size: int, vocab_size: int, tp: int = 1) -> int:
    """Rows of scores that a streamed loss holds: as many as are as large as the vectors of all `tokens`, or a quarter
    of the weight's gradient, which is read and written again for each group of rows: small ones wait for memory.

    Where `tp` ranks share the vocabulary a row of a rank's is shorter, and at least so many that MOST_EXCHANGES do.
    """
    rows = max(math.ceil(tokens * hidden_size * tp / vocab_size), hidden_size // 4)
    return min(tokens, rows if tp == 1 else max(rows, math.ceil(tokens / MOST_EXCHANGES)))


@lru_cache(maxsize=4096)
def micro_batch_bytes(
    shape: ModelShape,
    dtype: str,
    tokens: int,
    *,
    num_layers: int,
    recompute: Recompute,
    tp: int = 1,
    streamed: bool = False,
) -> Activations:
    """Of one micro-batch of `tokens` tokens a rank, through `num_layers` layers; `streamed` is how its loss is made."""
    e, h = BYTES[dtype], shape.hidden_size
    whole = layer_bytes(shape, dtype, tokens, tp)
    inner = e * shape.intermediate_size * shape.expert_room / tp
    kept, again = whole, 0
    if recompute == "full":
        kept, again = tokens * e * h, whole
    elif recompute == "selective":
        kept, again = whole - made_again_bytes(shape, dtype, tokens, tp), int(tokens * (inner + e * h))
    working = int(tokens * (2 * e * h + 3 * inner)) + again
    final_norm = tokens * (2 * FP32 * h + FP32 + e * h)
    if streamed:
        rows = scored_at_once(tokens, h, shape.vocab_size, tp) * shape.vocab_size // tp
        weight = h * shape.vocab_size // tp
        rounded = (e < FP32) * max(2 * e * rows, e * weight)
        return Activations(
            num_layers * kept, working, final_norm + tokens * e * h + FP32 * weight, FP32 * rows + rounded
        )
    scores = tokens * shape.vocab_size // tp * FP32
    return Activations(num_layers * kept, working, final_norm + scores, 2 * scores)
