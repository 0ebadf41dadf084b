"""The planner's estimate of memory against what tensors really hold, over layouts that the engine runs here.

Each layout trains a few steps in real processes; `tensor_memory.py` measures the peak of each rank over the last steps
(the first one makes what stays). The estimate is `plan.memory.memory_of`'s `tensor_bytes`, with no knob to turn. What
is offloaded counts too: on the CPU, device and host are the same memory.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from layout_ranks import Rank, run_ranks
from machine import describe, line
from tensor_memory import TensorMemory

from elastictrain.config import TrainConfig
from elastictrain.plan.cluster import Device
from elastictrain.plan.layout import RECOMPUTED, Recompute
from elastictrain.plan.memory import memory_of
from elastictrain.planning import candidate_of, job_of

STEPS = 3
ANY_DEVICE = Device(name="any", memory_bytes=1, flops={}, memory_bytes_per_s=1)
MODELS = {
    "wide": {"num_layers": 4, "hidden_size": 384, "num_heads": 6, "num_kv_heads": 2},
    "tiny": {"num_layers": 2, "hidden_size": 160, "num_heads": 4, "num_kv_heads": 2},
    "experts": {"num_layers": 2, "hidden_size": 256, "num_heads": 4, "num_experts": 8, "intermediate_size": 384},
    "deep": {"num_layers": 8, "hidden_size": 256, "num_heads": 8, "tie_embeddings": False, "dropout": 0.1},
}


@dataclass(frozen=True, slots=True)
class Case:
    """One layout of one model."""

    model: str
    dtype: str
    zero_stage: int
    world_size: int
    micro_batch: int
    accumulation: int = 2
    recompute: Recompute = "none"
    vocab_size: int = 2048
    seq_len: int = 128
    pp: int = 1
    tp: int = 1
    ep: int = 1
    sp: int = 1
    gradient_dtype: str = "fp32"
    offload: str = "none"

    @property
    def dp(self) -> int:
        """Replicas."""
        return self.world_size // (self.pp * self.tp * self.sp)

    def config(self) -> TrainConfig:
        """The run that it is."""
        return TrainConfig.from_dict(
            {
                "train": {
                    "dtype": self.dtype,
                    "micro_batch": self.micro_batch,
                    "global_batch": self.micro_batch * self.accumulation * self.dp,
                    "activation_checkpointing": self.recompute,
                },
                "model": MODELS[self.model],
                "data": {"seq_len": self.seq_len, "vocab_size": self.vocab_size},
                "parallel": {
                    "layout": "manual",
                    "zero_stage": self.zero_stage,
                    "pp": self.pp,
                    "tp": self.tp,
                    "ep": self.ep,
                    "sp": self.sp,
                    "gradient_dtype": self.gradient_dtype,
                    "offload": self.offload,
                },
                "elastic": {"max_workers": self.world_size},
            }
        )


CASES = (
    Case("wide", "fp32", 0, 1, 8),
    Case("wide", "fp32", 0, 2, 4, recompute="full"),
    Case("wide", "bf16", 0, 2, 1, 4),
    Case("wide", "fp32", 1, 1, 8),
    Case("wide", "fp32", 1, 2, 1),
    Case("wide", "fp32", 1, 2, 8, 1),
    Case("wide", "fp32", 1, 4, 4),
    Case("wide", "bf16", 1, 2, 8),
    Case("wide", "bf16", 1, 4, 2, recompute="full"),
    Case("wide", "fp32", 2, 2, 8, recompute="full"),
    Case("wide", "fp32", 2, 4, 1),
    Case("wide", "bf16", 2, 1, 8),
    Case("wide", "bf16", 2, 2, 1),
    Case("wide", "bf16", 2, 4, 4),
    Case("wide", "fp32", 3, 1, 4),
    Case("wide", "fp32", 3, 2, 1),
    Case("wide", "fp32", 3, 2, 8, 1),
    Case("wide", "fp32", 3, 4, 2, recompute="full"),
    Case("wide", "bf16", 3, 2, 8),
    Case("wide", "bf16", 3, 4, 1),
    Case("tiny", "fp32", 1, 2, 8),
    Case("tiny", "bf16", 3, 2, 4, vocab_size=8192),
    Case("tiny", "fp32", 2, 2, 2, seq_len=512),
    Case("deep", "fp32", 0, 2, 8, 1),
    Case("deep", "fp32", 1, 2, 2, recompute="full"),
    Case("deep", "bf16", 1, 4, 2),
    Case("deep", "bf16", 2, 2, 8, 1),
    Case("deep", "fp32", 3, 2, 4, 1),
    Case("deep", "bf16", 3, 4, 4, recompute="full"),
    Case("experts", "fp32", 1, 2, 4),
    Case("experts", "bf16", 3, 2, 8, recompute="full"),
    Case("experts", "fp32", 0, 2, 4, ep=2),
    Case("experts", "fp32", 1, 4, 8, ep=2),
    Case("experts", "bf16", 1, 2, 2, ep=2),
    Case("experts", "bf16", 2, 4, 4, 1, ep=2),
    Case("experts", "fp32", 2, 4, 2, ep=4),
    Case("wide", "fp32", 1, 2, 4, 4, pp=2),
    Case("wide", "fp32", 0, 2, 4, 4, pp=2),
    Case("wide", "bf16", 1, 2, 2, 4, pp=2),
    Case("wide", "bf16", 0, 4, 4, 4, pp=2),
    Case("wide", "fp32", 1, 4, 2, 4, pp=2),
    Case("deep", "bf16", 0, 2, 4, 4, pp=2),
    Case("tiny", "bf16", 1, 4, 8, 4, pp=2, tp=2, vocab_size=8192),
    Case("wide", "fp32", 1, 4, 2, 6, pp=4),
    Case("deep", "fp32", 1, 2, 8, 2, pp=2),
    Case("deep", "bf16", 1, 4, 2, 8, pp=4, recompute="full"),
    Case("tiny", "fp32", 0, 2, 8, 4, pp=2, vocab_size=8192),
    Case("wide", "fp32", 1, 2, 8, tp=2),
    Case("wide", "fp32", 0, 2, 2, 4, tp=2),
    Case("wide", "bf16", 1, 2, 4, tp=2),
    Case("wide", "fp32", 1, 4, 4, tp=2),
    Case("deep", "fp32", 1, 4, 4, tp=4, recompute="full"),
    Case("tiny", "bf16", 1, 2, 8, 1, tp=2, vocab_size=8192),
    Case("wide", "fp32", 1, 4, 4, 4, pp=2, tp=2),
    Case("deep", "bf16", 1, 4, 2, 4, pp=2, tp=2),
    Case("wide", "fp32", 2, 4, 4, tp=2),
    Case("wide", "bf16", 3, 4, 4, tp=2),
    Case("wide", "fp32", 1, 2, 1, gradient_dtype="bf16"),
    Case("wide", "fp32", 3, 2, 1, gradient_dtype="int8"),
    Case("wide", "fp32", 1, 2, 4, offload="cpu"),
    Case("wide", "bf16", 1, 2, 2, offload="cpu"),
    Case("wide", "fp32", 2, 2, 4, offload="cpu"),
    Case("wide", "fp32", 3, 2, 4, offload="cpu"),
    Case("wide", "fp32", 1, 2, 4, 4, pp=2, offload="cpu"),
    Case("wide", "bf16", 1, 4, 2, 4, pp=2, offload="cpu"),
    Case("wide", "bf16", 2, 2, 2, offload="cpu"),
    Case("wide", "bf16", 3, 2, 2, offload="cpu"),
    Case("deep", "bf16", 1, 4, 2, 1, offload="cpu"),
    Case("deep", "bf16", 1, 2, 4, 2, pp=2, offload="cpu"),
    Case("wide", "fp32", 1, 2, 8, recompute="selective"),
    Case("deep", "bf16", 1, 2, 4, 4, pp=2, recompute="selective"),
    Case("deep", "fp32", 1, 2, 8, tp=2, recompute="selective"),
    Case("experts", "bf16", 1, 2, 8, recompute="selective"),
    Case("wide", "bf16", 3, 2, 8, recompute="selective"),
    Case("experts", "fp32", 1, 4, 2, 4, pp=2, ep=2),
    Case("experts", "bf16", 1, 4, 4, 4, pp=2, ep=2),
    Case("experts", "fp32", 1, 4, 4, tp=2, ep=2),
    Case("experts", "bf16", 2, 4, 2, tp=2, ep=2, recompute="full"),
    Case("experts", "bf16", 0, 2, 2, 4, pp=2),
    Case("experts", "fp32", 0, 2, 4, tp=2),
    Case("wide", "fp32", 1, 2, 4, sp=2),
    Case("wide", "bf16", 2, 2, 8, sp=2),
    Case("deep", "fp32", 1, 4, 4, tp=2, sp=2),
    Case("wide", "bf16", 1, 4, 4, 4, pp=2, sp=2),
)


def measure(rank: Rank) -> int:
    """The peak of one rank's tensors in the steps after the first."""
    with TensorMemory() as memory:
        engine = rank.build()
        rank.step(engine)
        memory.reset_peak()
        for _ in range(STEPS - 1):
            rank.step(engine)
    engine.close()
    return int(memory.peak_bytes)


def compare(case: Case) -> dict[str, Any]:
    """One row of the table."""
    config = case.config()
    candidate = candidate_of(config, case.world_size)
    estimate = memory_of(job_of(config).shape, job_of(config).dtype, candidate, ANY_DEVICE)
    measured = max(run_ranks(config, case.world_size, measure))
    estimated = estimate.tensor_bytes + estimate.host_bytes
    found = {"measured_bytes": measured, "estimated_bytes": estimated, "error": round(estimated / measured - 1, 4)}
    return {**asdict(case), **found, "estimate": estimate.to_json()}


def main() -> None:
    """Measure all cases and print how far the estimates are off."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one object")
    parser.add_argument("--out", type=Path, help="write the object here too")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the cases to measure")
    arguments = parser.parse_args()
    chosen = CASES if arguments.only is None else [CASES[i] for i in arguments.only]
    machine, rows = describe(), []
    for case in chosen:
        rows.append(compare(case))
        if not arguments.json:
            print(_line(rows[-1]), flush=True)
    worst = max(abs(row["error"]) for row in rows)
    result = {"machine": machine, "rows": rows, "worst_error": worst}
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2))
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        print(f"\nworst of {len(rows)}: {100 * worst:.1f} %\n{line(machine)}")


def _line(row: dict[str, Any]) -> str:
    size = f"{row['micro_batch']}x{row['accumulation']}{RECOMPUTED[row['recompute']]}"
    size += f" gradients-{row['gradient_dtype']}" if row["gradient_dtype"] != "fp32" else ""
    size += f" offload-{row['offload']}" if row["offload"] != "none" else ""
    split = "".join(f" {name}{row[name]}" for name in ("pp", "tp", "sp", "ep") if row[name] > 1)
    degrees = f"dp{row['world_size'] // (row['pp'] * row['tp'] * row['sp'])}{split}"
    return (
        f"{row['model']} {row['dtype']} zero{row['zero_stage']} {degrees:<11} {size:<14} "
        f"measured {row['measured_bytes'] / 1e6:7.1f} MB  estimate {row['estimated_bytes'] / 1e6:7.1f} MB "
        f"{100 * row['error']:+5.1f} %  worst moment: {row['estimate']['moment']}"
    )


if __name__ == "__main__":
    main()
