"""What one rank of a pipeline stage holds and computes of the model (pure).

Layers are dealt to stages as the engine deals them (`part`); the embedding lies in the first stage and the head in the
last, which borrows a tied embedding: the weights and their gradient, without optimizer state. Matrices are split by tp,
experts by ep; norms and routers are not split.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from elastictrain.plan.model_shape import ModelShape
from elastictrain.plan.part import deal_blocks
from elastictrain.plan.space import Candidate
from elastictrain.plan.zero_memory import PERSISTENT_ELEMENTS


@dataclass(frozen=True, slots=True)
class Stage:
    """One rank's part."""

    index: int
    num_layers: int
    first: bool
    last: bool
    dense: int
    """Parameters that are updated here, but for experts."""
    experts: int
    """Parameters of experts."""
    table: int
    """Elements of the embedding, if it lies here."""
    tied: bool
    """Whether this stage uses it as the head too."""
    shared: int
    """Elements of a tied embedding that this stage shares with the other end of a pipeline: lent by the first, borrowed
    by the last."""
    small: int
    """Elements in weights of at most PERSISTENT_ELEMENTS."""
    largest: int
    """Elements of the largest weight."""


def stage_of(shape: ModelShape, candidate: Candidate, index: int) -> Stage:
    """The part of each rank in pipeline stage `index`."""
    return _stage(shape, candidate.pp, candidate.tp, candidate.ep, index)


@lru_cache(maxsize=4096)
def _stage(shape: ModelShape, pp: int, tp: int, ep: int, index: int) -> Stage:
    num_layers = deal_blocks(shape, pp)[index]
    first, last = index == 0, index == pp - 1
    norms = shape.dense_layer_parameters - shape.attention_parameters
    layer = norms + -(-shape.attention_parameters // tp)
    mlp = -(-shape.expert_parameters // tp)
    if shape.num_experts == 1:
        layer += mlp
    experts = num_layers * (shape.num_experts // ep) * mlp if shape.num_experts > 1 else 0
    table = -(-shape.embedding_parameters // tp)
    final_norm = shape.hidden_size * (1 + shape.biases)
    dense = num_layers * layer + first * table
    tied = shape.tie_embeddings and first and last
    if last:
        dense += final_norm + -(-(shape.head_parameters - final_norm) // tp)
    small = _small_elements(shape, num_layers, tp) + last * final_norm
    shared = table if shape.tie_embeddings and first != last else 0
    matrix = shape.hidden_size * max(shape.intermediate_size, shape.query_size) // tp
    largest = max(matrix, table if first or last else 0)
    return Stage(index, num_layers, first, last, dense, experts, first * table, tied, shared, small, largest)


def heaviest(candidate: Candidate) -> tuple[int, ...]:
    """The stages that may need most memory: the first holds most micro-batches, the last the scores."""
    return (0,) if candidate.pp == 1 else (0, candidate.pp - 1)


def _small_elements(shape: ModelShape, num_layers: int, tp: int) -> int:
    matrices = [shape.hidden_size * size for size in (shape.query_size, shape.kv_size, shape.kv_size, shape.query_size)]
    if shape.num_experts == 1:
        matrices += [shape.hidden_size * shape.intermediate_size] * (3 if shape.gated_mlp else 2)
    split = (elements // tp for elements in matrices)
    each = sum(elements for elements in split if elements <= PERSISTENT_ELEMENTS)
    return num_layers * (each + 2 * shape.hidden_size)
