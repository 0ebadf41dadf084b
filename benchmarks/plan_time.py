"""The planner's ranking of layouts by time against the measured one.

A profile of a few layouts gives the cluster's `Efficiency` (`plan.calibrate`); other layouts of the same model and
global batch are then predicted, and measured in real processes. What counts is their order: Kendall's tau (1: the same
order, 0: none). Layouts are measured in rounds, and each by its fastest steps, so that a disturbance hits no one alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

from layout_ranks import Rank, run_ranks
from machine import describe, line

from elastictrain.config import TrainConfig
from elastictrain.machines import this_machine
from elastictrain.plan.calibrate import Measured, calibrate
from elastictrain.plan.layout import Recompute
from elastictrain.plan.space import Candidate
from elastictrain.plan.step_time import step_time
from elastictrain.planning import candidate_of, job_of

GLOBAL_BATCH = 16
WARM_STEPS = 2
STEPS = 6
MODEL = {"num_layers": 4, "hidden_size": 256, "num_heads": 4, "num_kv_heads": 2}


class Spec(NamedTuple):
    """A layout of the model above."""

    dp: int
    zero_stage: int
    micro_batch: int
    recompute: Recompute = "none"
    pp: int = 1
    tp: int = 1
    sp: int = 1

    @property
    def world_size(self) -> int:
        """Ranks."""
        return self.dp * self.pp * self.tp * self.sp


PROFILE = (
    Spec(1, 0, 1),
    Spec(1, 0, 16),
    Spec(1, 3, 2),
    Spec(2, 0, 8),
    Spec(2, 1, 1),
    Spec(2, 1, 4, "full"),
    Spec(2, 2, 2),
    Spec(2, 3, 4),
)
RANKED = (
    Spec(1, 0, 4),
    Spec(1, 1, 2, "full"),
    Spec(1, 2, 8),
    Spec(1, 3, 1),
    Spec(1, 3, 16, "full"),
    Spec(2, 0, 1, "full"),
    Spec(2, 0, 4),
    Spec(2, 1, 2),
    Spec(2, 1, 8, "full"),
    Spec(2, 2, 1),
    Spec(2, 2, 8),
    Spec(2, 3, 1),
    Spec(2, 3, 2, "full"),
    Spec(2, 3, 8),
    Spec(1, 1, 8, "selective"),
    Spec(2, 1, 8, "selective"),
)
SPLIT = (
    Spec(1, 0, 2, pp=2),
    Spec(1, 1, 4, pp=2),
    Spec(1, 1, 8, "full", pp=2),
    Spec(1, 0, 8, tp=2),
    Spec(1, 1, 2, tp=2),
    Spec(1, 1, 16, "full", tp=2),
    Spec(1, 1, 2, sp=2),
    Spec(1, 2, 8, sp=2),
)
"""Ranked too, with none in the profile: what the planner knows of pipelines, shared matrices and sequences is tried."""


def config_of(spec: Spec) -> TrainConfig:
    """The run with this layout."""
    train = {"global_batch": GLOBAL_BATCH, "micro_batch": spec.micro_batch, "activation_checkpointing": spec.recompute}
    degrees = {"pp": spec.pp, "tp": spec.tp, "sp": spec.sp}
    parallel = {"layout": "manual", "zero_stage": spec.zero_stage, **degrees}
    return TrainConfig.from_dict(
        {
            "train": train,
            "model": MODEL,
            "data": {"seq_len": 128, "vocab_size": 2048},
            "parallel": parallel,
            "elastic": {"max_workers": spec.world_size},
        }
    )


def candidate(spec: Spec) -> Candidate:
    """The same as the planner sees it."""
    return candidate_of(config_of(spec), spec.world_size)


def measure(rank: Rank) -> list[float]:
    """Seconds of each step after the first ones."""
    engine, seconds = rank.build(), []
    for _ in range(WARM_STEPS + STEPS):
        rank.group.meet()
        begun = time.perf_counter()
        rank.step(engine)
        seconds.append(time.perf_counter() - begun)
    engine.close()
    return seconds[WARM_STEPS:]


def kendall_tau(predicted: list[float], measured: list[float]) -> float:
    """Pairs in the same order less those in the other, of all pairs."""
    pairs = list(combinations(range(len(measured)), 2))
    same = sum((predicted[i] - predicted[j]) * (measured[i] - measured[j]) > 0 for i, j in pairs)
    return (2 * same - len(pairs)) / len(pairs)


def main() -> None:
    """Calibrate, predict, measure, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one object")
    parser.add_argument("--out", type=Path, help="write the object here too")
    parser.add_argument("--rounds", type=int, default=2, help="times that every layout is measured")
    arguments = parser.parse_args()
    machine, cluster = describe(), this_machine(2)
    seconds: dict[Spec, list[float]] = {spec: [] for spec in (*PROFILE, *RANKED, *SPLIT)}
    for _ in range(arguments.rounds):
        for spec, found in seconds.items():
            found += max(run_ranks(config_of(spec), spec.world_size, measure), key=statistics.median)
    # the median of the faster half
    measured = {spec: statistics.median(sorted(found)[: len(found) // 2]) for spec, found in seconds.items()}

    job = job_of(config_of(PROFILE[0]))
    profile = [Measured(candidate(spec), measured[spec]) for spec in PROFILE]
    cluster = cluster.model_copy(update={"efficiency": calibrate(job.shape, job.dtype, cluster, profile)})
    rows = []
    for spec in seconds:
        time_of = step_time(job.shape, job.dtype, candidate(spec), cluster)
        rows.append(
            {
                "layout": str(candidate(spec)),
                "profile": spec in PROFILE,
                "split": spec in SPLIT,
                "measured_s": round(measured[spec], 4),
                "predicted_s": round(time_of.step_s, 4),
                "parts": {part: round(value, 4) for part, value in time_of.to_json().items()},
            }
        )
    ranked = [row for row in rows if not row["profile"]]
    whole = [row for row in ranked if not row["split"]]
    result = {
        "machine": machine,
        "cluster": cluster.model_dump(mode="json"),
        "rows": rows,
        "kendall_tau": _tau(ranked),
        "kendall_tau_unsplit": _tau(whole),
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2))
    print(json.dumps(result, indent=2) if arguments.json else _text(result))


def _tau(rows: list[dict[str, Any]]) -> float:
    return round(kendall_tau([row["predicted_s"] for row in rows], [row["measured_s"] for row in rows]), 3)


def _text(result: dict[str, Any]) -> str:
    lines = []
    for row in sorted(result["rows"], key=lambda row: (not row["profile"], row["measured_s"])):
        error = 100 * (row["predicted_s"] / row["measured_s"] - 1)
        kind = "profile" if row["profile"] else "split" if row["split"] else "ranked"
        lines.append(
            f"{kind:8} {row['layout']:28} measured {row['measured_s']:.3f} s  "
            f"predicted {row['predicted_s']:.3f} s {error:+6.1f} %"
        )
    shares = ", ".join(f"{name} {value:.3g}" for name, value in result["cluster"]["efficiency"].items())
    tau = f"Kendall tau of the ranked ones: {result['kendall_tau']:.2f}"
    lines += [f"\nefficiency: {shares}", f"{tau}; of those with a whole model: {result['kendall_tau_unsplit']:.2f}"]
    return "\n".join([*lines, line(result["machine"])])


if __name__ == "__main__":
    main()
