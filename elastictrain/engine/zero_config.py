"""What DeepSpeed is told: the config and the optimizer of one layout (pure, but for building the optimizer)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import AdamW

from elastictrain.config import TrainSection
from elastictrain.engine.device import Device
from elastictrain.plan.layout import Layout
from elastictrain.plan.zero_memory import LARGEST_BUCKET
from elastictrain.workloads.base import Workload

INITIAL_LOSS_SCALE_POWER = 16
"""Of two: what fp16 begins with; it is halved until gradients are finite, and doubled after 1000 steps in which all
were."""


def deepspeed_config(train: TrainSection, layout: Layout, device: Device, num_elements: int) -> dict[str, Any]:
    """The config of `deepspeed.initialize`. Gradients of bf16 and fp16 are added up in fp32, over batches and, unless
    `parallel.gradient_dtype` is bf16, over ranks.

    Stage 0 is the exception: DeepSpeed can accumulate its micro-batches only in the type of the weights.
    """
    bucket = min(LARGEST_BUCKET, num_elements + num_elements % 2)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": layout.micro_batch,
        "gradient_accumulation_steps": layout.accumulation,
        "gradient_clipping": 0.0 if clips_itself(train, layout) else train.grad_clip,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # int8 is made of fp32: see `quantized`
        "communication_data_type": "bf16" if layout.gradient_dtype == "bf16" else "fp32",
        "zero_optimization": {
            "stage": layout.zero_stage,
            # It maps parameters to fragments of others: exported states would be mixed up.
            "round_robin_gradients": False,
            # A pipeline reduces gradients once, after its last micro-batch: it has nothing to overlap with. And two
            # collectives of nccl at once, a reduction and the experts' exchange, might wait for each other.
            "overlap_comm": device.is_cuda and layout.pp == layout.ep == 1,
            "contiguous_gradients": True,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
        "timers": {"throughput": {"enabled": False}},
        "steps_per_print": None,
    }
    if layout.offload != "none":
        # What goes on to a drive goes there from the host's memory: see `drive`.
        away = {"device": "cpu", "pin_memory": device.is_cuda}
        config["zero_optimization"]["offload_optimizer"] = away
        if layout.zero_stage == 3:
            config["zero_optimization"]["offload_param"] = away
    if train.dtype == "fp16":
        config["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": INITIAL_LOSS_SCALE_POWER}
    if train.dtype == "bf16":
        config["bf16"] = {"enabled": True}
    if train.dtype != "fp32" and layout.zero_stage > 0:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def clips_itself(train: TrainSection, layout: Layout) -> bool:
    """Whether this layout clips in the engine: plain fp32 at stage 0, whose norm DeepSpeed computes and drops."""
    return layout.zero_stage == 0 and train.dtype == "fp32"


def adamw(workload: Workload, train: TrainSection, parameters: Mapping[str, Tensor]) -> AdamW:
    """AdamW with one group of decaying parameters and one of the others, in the order of the model.

    Experts that ranks have of their own (`engine.experts`) are groups for themselves, which DeepSpeed asks for.

    The rate is 0 until the first step sets it: one of DeepSpeed's optimizers takes a step while it is built. The fused
    kernel makes one pass over the state instead of ten, and gives the same bits every time.
    """
    groups: dict[tuple[str | None, bool], list[Tensor]] = {(None, True): [], (None, False): []}
    for name, parameter in parameters.items():
        kind = getattr(parameter, "group_name", None), workload.decays(name, parameter)
        groups.setdefault(kind, []).append(parameter)
    told: list[dict[str, Any]] = [
        {"params": params, "weight_decay": train.weight_decay if decays else 0.0}
        | ({"moe": True, "name": experts} if experts else {})
        for (experts, decays), params in groups.items()
        if params
    ]
    return AdamW(told, lr=0.0, betas=(train.beta1, train.beta2), eps=train.epsilon, fused=True)
