"""Which layouts the engines run (pure): the one place that knows, for the config's checks and for the planner's space.

What DeepSpeed can't do at all (ZeRO 2 and 3 under a pipeline) and what this project's engines do not do are told in the
words of the config: the values, and what to set instead.
"""

from __future__ import annotations

from typing import Literal

from elastictrain.plan.cluster import Dtype
from elastictrain.plan.layout import GradientDtype, Offload
from elastictrain.plan.space import sends

SPLIT_KIND = "transformer"
"""The kind of model that can be dealt out to several workers."""
DEFAULT_ZERO_STAGE = 1
"""Where nobody asks for another: optimizer state is sharded, which costs next to nothing and saves the most."""


def refusal(
    dtype: Dtype | Literal["fp16"],
    *,
    zero_stage: int,
    pp: int = 1,
    tp: int = 1,
    sp: int = 1,
    ep: int = 1,
    offload: Offload = "none",
    gradient_dtype: GradientDtype = "fp32",
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    seq_len: int,
    num_experts: int = 1,
    kind: str = SPLIT_KIND,
) -> str | None:
    """Why no engine runs this; None for what one does. `kind` is the model's, and 1 expert stands for none."""
    if kind != SPLIT_KIND and pp * tp > 1:
        return (
            f"parallel.pp {pp} and parallel.tp {tp} can't split model.kind {kind}, only this project's "
            "transformer: set both to 1, and parallel.zero_stage 3 where the model is too large for one worker"
        )
    if pp > 1 and zero_stage > 1:
        return (
            f"parallel.zero_stage {zero_stage} does not go with parallel.pp {pp}: a stage needs its whole gradients "
            "until the last micro-batch; set parallel.zero_stage to 0 or 1, or parallel.pp to 1"
        )
    if tp > 1 and dtype == "bf16" and zero_stage == 0:
        return (
            f"parallel.tp {tp} with train.dtype bf16 and parallel.zero_stage 0: DeepSpeed's norm of the gradient would "
            "leave out what other workers of a replica hold; set parallel.zero_stage to 1"
        )
    if dtype == "fp16" and (pp * tp * ep > 1 or zero_stage == 0):
        return (
            "train.dtype fp16 is written for parallel.zero_stage 1, 2 and 3 of models that are not split: set that, "
            "and parallel.pp, parallel.tp and parallel.ep to 1, or train.dtype to bf16"
        )
    if not sends(zero_stage, gradient_dtype):
        return (
            f"parallel.gradient_dtype {gradient_dtype} needs parallel.zero_stage 3, not {zero_stage}: only there does "
            "DeepSpeed hand gradients over before they are summed; set that, or parallel.gradient_dtype to bf16"
        )
    if problem := _refuses_offload(offload, zero_stage):
        return problem
    if problem := _refuses_sequences(sp, tp, num_experts, num_heads, seq_len, kind):
        return problem
    if problem := _refuses_experts(dtype, zero_stage, ep, num_experts):
        return problem
    if num_kv_heads % tp:
        return (
            f"parallel.tp {tp} workers can't share {num_kv_heads} heads of keys and values evenly: set parallel.tp to "
            "a divisor of model.num_kv_heads (of model.num_heads where that is not set)"
        )
    if pp > num_layers:
        return (
            f"parallel.pp {pp} stages can't share model.num_layers {num_layers}: each needs at least one; set "
            f"parallel.pp to at most {num_layers}"
        )
    return None


def _refuses_experts(dtype: str, zero_stage: int, ep: int, num_experts: int) -> str | None:
    if ep > 1 and num_experts == 1:
        return (
            f"parallel.ep {ep} workers have no experts to share: set model.num_experts to a multiple of it, or "
            "parallel.ep to 1"
        )
    if num_experts % ep:
        return (
            f"parallel.ep {ep} workers can't share model.num_experts {num_experts} evenly: set parallel.ep to a "
            "divisor of model.num_experts"
        )
    if ep > 1 and zero_stage == 3:
        return (
            f"parallel.zero_stage 3 does not go with parallel.ep {ep}: DeepSpeed shards no experts that workers have "
            "of their own; set parallel.zero_stage to 2 or less, or parallel.ep to 1"
        )
    if ep > 1 and dtype == "bf16" and zero_stage == 0:
        return (
            f"parallel.ep {ep} with train.dtype bf16 and parallel.zero_stage 0: DeepSpeed's norm of the gradient would "
            "leave the experts out; set parallel.zero_stage to 1 or 2"
        )
    return None


def _refuses_offload(offload: Offload, zero_stage: int) -> str | None:
    if offload != "none" and zero_stage == 0:
        return (
            f"parallel.offload {offload} needs parallel.zero_stage 1, 2 or 3, not 0: what ZeRO shards is what it "
            "moves; set parallel.zero_stage to 1"
        )
    return None


def _refuses_sequences(sp: int, tp: int, num_experts: int, num_heads: int, seq_len: int, kind: str) -> str | None:
    if sp == 1:
        return None
    if kind != SPLIT_KIND:
        return (
            f"parallel.sp {sp} can't split sequences of model.kind {kind}, only those of this project's transformer: "
            "set parallel.sp to 1, and train.activation_checkpointing where memory is short"
        )
    if num_experts > 1:
        return (
            f"parallel.sp {sp} does not go with model.num_experts {num_experts}: which tokens find room with an expert "
            "would depend on who has which positions; set parallel.sp to 1, and parallel.tp or parallel.pp instead"
        )
    if seq_len % sp:
        return (
            f"parallel.sp {sp} workers can't share sequences of data.seq_len {seq_len} evenly: {seq_len} / {sp} = "
            f"{seq_len / sp:g}; set parallel.sp to a divisor of data.seq_len"
        )
    if num_heads % (tp * sp):
        each = f"{num_heads} attention heads"
        if tp > 1:
            each = f"the {num_heads // tp} of {each} that parallel.tp {tp} leaves a worker"
        return (
            f"parallel.sp {sp} workers can't share {each} evenly, as they do within attention: set parallel.sp to a "
            f"divisor of {num_heads // tp}"
        )
    return None
