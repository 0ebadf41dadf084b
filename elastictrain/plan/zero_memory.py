"""Bytes of weights, gradients and optimizer state under each ZeRO stage, as DeepSpeed 0.19 holds them (pure).

Rajbhandari et al. 2020 ("ZeRO", arXiv:1910.02054, section 3) count, for P parameters in 2 bytes and K = 12 bytes of
fp32 master and moments over N ranks: 4 P + K P / N (stage 1), 2 P + (2 + K) P / N (stage 2), (4 + K) P / N (stage 3).
What this engine asks of DeepSpeed differs: gradients are summed and sent in fp32; fp32 weights have masters of their
own from stage 1 on; buffers hold a bucket of gradients each. By stage and dtype, bytes a parameter, B for those in a
bucket:

                    weights   optimizer   gradients                buffers at the reduction
    0   fp32        4         8           4                        4 B   flattened copy
        bf16        2         12          2                        6 B   the same, and in fp32
    1   fp32        4         12/N        4, then 4/N              4 B   bucket
        bf16        2         12/N        4 + 2                    4 B   flattened copy
    2   fp32        4         12/N        4/N                      8 B   bucket, flattened copy
        bf16        2         12/N        4/N                      8 B   the same in bf16, and in fp32
    3   fp32        4/N       12/N        4/N                      12 B  bucket, flattened and scattered copy
        bf16        2/N       12/N        4/N                      12 B

In a pipeline, DeepSpeed trains bf16 at stage 0 with the optimizer of stage 1, and with gradients in bf16: 12/N and
2 + 2. With offload it trains bf16 at stage 1 with the optimizer of fp32: gradients of 4, two buckets of 2 B, and in
a pipeline 4/N and copies of 8 B, since all is reduced at once.

On more than one rank, stage 3 also holds whole weights beside its shares: those up to 100,000 elements for ever, and up
to a billion elements in all from their use in the forward pass to that in the backward pass. Measured:
`benchmarks/plan_memory.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from elastictrain.plan.activations import BYTES, FP32

LARGEST_BUCKET = 50_000_000
"""Elements that are reduced together, at most, from stage 1 on; ZeRO keeps a buffer of this size, and a second one
where communication overlaps (CUDA), which counts as the device's `reserved_bytes`."""
LARGEST_FLAT_BUCKET = 500_000_000
"""Elements that DeepSpeed reduces together at stage 0, and at stage 1 in bf16."""
LIVE_PARAMETERS = 1_000_000_000
"""Elements that stage 3 keeps gathered at once (stage3_max_live_parameters)."""
PERSISTENT_ELEMENTS = 100_000
"""Weights up to this size stay gathered at stage 3 (stage3_param_persistence_threshold)."""
ADAM_MOMENTS = 2


@dataclass(frozen=True, slots=True)
class StateBytes:
    """Bytes of one rank's model state, by part."""

    weights: int
    """That forward and backward use, between steps."""
    optimizer: int
    """Masters, where they are not the weights themselves, and moments."""
    gathered: int = 0
    """Whole weights that stage 3 holds beside its shares during forward and backward."""
    gathered_last: int = 0
    """What is left of that when gradients are reduced: the embedding, which is used last."""
    gradients_before: int = 0
    """Gradients while the step's first micro-batch runs: buffers that never go away."""
    gradients_between: int = 0
    """Gradients while its later micro-batches run."""
    gradients_after: int = 0
    """Gradients when they are reduced."""
    bucket_before: int = 0
    """Buckets while the first micro-batch's forward pass runs."""
    bucket_between: int = 0
    """Buckets while a later micro-batch's forward pass runs."""
    bucket: int = 0
    """Buckets while gradients are made."""
    reduction: int = 0
    """Copies of gradients while they are reduced."""
    update: int = 0
    """Gradients and copies of them while the update is made."""


def state_bytes(
    parameters: int,
    dtype: str,
    zero_stage: int,
    group: int,
    *,
    table: int = 0,
    tied: bool = False,
    small: int = 0,
    pipeline: bool = False,
    offload: bool = False,
) -> StateBytes:
    """Of `parameters` elements on this rank, sharded by ZeRO over `group` ranks.

    `table` are the elements of the embedding here, if `tied` used twice, so that two gradients are added; `small` those
    of weights with at most 100,000 elements; `pipeline` says that the rank is a stage of one, `offload` that the
    optimizer lies elsewhere.
    """
    e = BYTES[dtype]
    weights, both_uses = e * parameters, 2 * e * table * tied
    share = -(-parameters // group)
    optimizer = FP32 * (ADAM_MOMENTS + 1) * share
    if zero_stage == 0 and pipeline and e < FP32:
        return _stage_0_bf16_pipeline(weights, optimizer, FP32 * share, both_uses)
    if zero_stage == 0:
        return _stage_0(parameters, e, weights, both_uses)
    bucket = min(parameters, LARGEST_BUCKET)
    if zero_stage == 1 and e < FP32 and offload:
        return _stage_1_bf16_offloaded(parameters, bucket, weights, optimizer, share, both_uses, pipeline)
    if zero_stage == 1 and e < FP32:
        return _stage_1_bf16(parameters, weights, optimizer, both_uses)
    if zero_stage == 1:
        between = FP32 * bucket
        return StateBytes(
            weights, optimizer, gradients_between=weights, gradients_after=weights,
            bucket_between=between, bucket=between, reduction=both_uses, update=2 * FP32 * share,
        )  # fmt: skip
    if zero_stage == 2:
        low = e < FP32
        return StateBytes(
            weights, optimizer, gradients_between=FP32 * share, gradients_after=FP32 * share,
            bucket=e * bucket, reduction=(e + FP32 * low) * bucket, update=(1 if low else 2) * FP32 * share,
        )  # fmt: skip
    standing, ever = FP32 * share, FP32 * bucket
    kept, used_last = (small, table) if group > 1 else (0, 0)
    gathered = min(parameters - small, LIVE_PARAMETERS) if group > 1 else 0
    return StateBytes(
        e * (share + kept), optimizer, gathered=e * gathered, gathered_last=e * min(used_last, gathered),
        gradients_before=standing, gradients_between=standing, gradients_after=standing,
        bucket_before=ever, bucket_between=ever, bucket=ever, reduction=2 * ever, update=standing + ever,
    )  # fmt: skip


def _stage_0(parameters: int, e: int, weights: int, both_uses: int) -> StateBytes:
    low = e < FP32
    copies = min(parameters, LARGEST_FLAT_BUCKET) * (e + FP32 * low)
    return StateBytes(
        weights, FP32 * (ADAM_MOMENTS + low) * parameters, gradients_between=weights, gradients_after=weights,
        reduction=max(copies, both_uses), update=weights + FP32 * low * parameters,
    )  # fmt: skip


def _stage_0_bf16_pipeline(weights: int, optimizer: int, fp32_share: int, both_uses: int) -> StateBytes:
    return StateBytes(
        weights, optimizer, gradients_before=weights, gradients_between=2 * weights, gradients_after=2 * weights,
        reduction=max(weights, both_uses), update=2 * weights + fp32_share,
    )  # fmt: skip


def _stage_1_bf16(parameters: int, weights: int, optimizer: int, both_uses: int) -> StateBytes:
    standing = FP32 * parameters
    copies = FP32 * min(parameters, LARGEST_FLAT_BUCKET)
    return StateBytes(
        weights, optimizer, gradients_before=standing, gradients_between=standing + weights,
        gradients_after=standing + weights, reduction=max(copies, both_uses), update=standing + weights,
    )  # fmt: skip


def _stage_1_bf16_offloaded(
    parameters: int, bucket: int, weights: int, optimizer: int, share: int, both_uses: int, pipeline: bool
) -> StateBytes:
    # a pipeline reduces all gradients when its micro-batches are done: in one buffer, and in a flattened copy of it
    summed, buckets = FP32 * parameters, 2 * BYTES["bf16"] * bucket
    after, copies = (FP32 * share, 2 * FP32 * bucket) if pipeline else (summed, both_uses)
    return StateBytes(
        weights, optimizer, gradients_between=summed, gradients_after=after,
        bucket_between=buckets, bucket=buckets, reduction=copies, update=2 * FP32 * share,
    )  # fmt: skip
