"""From a few measured steps to the planner's `Efficiency` (pure).

A step's time is linear in the reciprocals of the shares and in the fixed seconds:

    step = matmul / x + memory / y + network / z + (micro-batches) a + b + (layers gathered) c

where each of the first terms is what the time model gives when all else is infinitely fast. The coefficients are found
by least squares of relative errors, none of them negative, by coordinate descent: 0.3 s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from elastictrain.plan.cluster import Cluster, Dtype, Efficiency
from elastictrain.plan.model_shape import ModelShape
from elastictrain.plan.space import Candidate
from elastictrain.plan.step_time import step_time

SWEEPS = 20_000
SPEEDS = ("matmul", "memory", "network")
FASTEST = 1e3
"""No share is taken to be larger: of work whose time does not show."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One layout's measured step."""

    candidate: Candidate
    step_s: float


def calibrate(shape: ModelShape, dtype: Dtype, cluster: Cluster, measured: Sequence[Measured]) -> Efficiency:
    """What explains the measured steps best; the six coefficients need as many layouts, as different as can be."""
    rows = [[t / m.step_s for t in _terms(shape, dtype, m.candidate, cluster)] for m in measured]
    found = _least_squares(rows, [1.0] * len(rows))
    shares = {name: 1 / max(coefficient, 1 / FASTEST) for name, coefficient in zip(SPEEDS, found)}
    micro_batch_s, step_s, gathered_layer_s = found[len(SPEEDS) :]
    return Efficiency(**shares, micro_batch_s=micro_batch_s, step_s=step_s, gathered_layer_s=gathered_layer_s)


def _terms(shape: ModelShape, dtype: Dtype, candidate: Candidate, cluster: Cluster) -> list[float]:
    """The time of each kind of work alone, at its stated speed; micro-batches, one step, layers gathered."""
    infinite = dict.fromkeys(SPEEDS, math.inf)

    def seconds(shares: dict[str, float]) -> float:
        so_fast = cluster.model_copy(update={"efficiency": Efficiency(**shares)})
        return step_time(shape, dtype, candidate, so_fast).step_s

    alone = [seconds(infinite | {speed: 1.0}) for speed in SPEEDS]
    nothing = seconds(infinite)
    # What is left when all bandwidths are infinite is the links' latency, which goes with the network.
    gathered = candidate.accumulation * shape.num_layers if candidate.zero_stage == 3 else 0
    return [alone[0] - nothing, alone[1] - nothing, alone[2], candidate.accumulation, 1.0, gathered]


def _least_squares(rows: Sequence[Sequence[float]], targets: Sequence[float]) -> list[float]:
    size = len(rows[0])
    gram = [[sum(row[i] * row[j] for row in rows) for j in range(size)] for i in range(size)]
    moment = [sum(row[i] * target for row, target in zip(rows, targets)) for i in range(size)]
    found = [0.0] * size
    for _ in range(SWEEPS):
        for i in range(size):
            if gram[i][i] > 0:
                rest = sum(gram[i][j] * found[j] for j in range(size) if j != i)
                found[i] = max(0.0, (moment[i] - rest) / gram[i][i])
    return found
