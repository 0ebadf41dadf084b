"""State that lies in the host's memory or on its drive: the losses are those of state on the device.

On the CPU all three are the same memory, so what is tested is what DeepSpeed does otherwise then. About 20 s.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from ranks import Rank, run_team
from training import train, train_config, workload

from elastictrain.config import TrainConfig
from elastictrain.engine.build import build_engine
from elastictrain.engine.drive import move_to_drive
from elastictrain.engine.zero_state import Piece
from elastictrain.errors import ConfigError, InfrastructureError

Losses = dict[tuple[int, int], float]
KINDS: list[tuple[int, str, dict[str, int]]] = [
    (1, "fp32", {}),
    (2, "fp32", {}),
    (3, "fp32", {}),
    (1, "fp32", {"tp": 2}),
    (1, "fp32", {"pp": 2}),
    (1, "bf16", {"pp": 2}),
    (1, "bf16", {}),
    (2, "bf16", {}),
    (3, "bf16", {}),
    (1, "fp32", {"ep": 2}),
    (2, "bf16", {"ep": 2}),
]
STEPS = range(1, 6)


def each_way(me: Rank) -> list[list[Losses]]:
    """For each kind the losses with state on the device, in the host's memory, and on its drive."""
    found: list[list[Losses]] = []
    for kind, (stage, dtype, degrees) in enumerate(KINDS):
        found.append([])
        for way, offload in enumerate(("none", "cpu", "nvme")):
            config = train_config(stage, dtype, degrees=degrees, offload=offload)
            group = me.group(3 * kind + way, (0, 1))
            group.form()
            engine = build_engine(workload(config), config, config.layout(2), group)
            found[-1].append(train(engine, config, me.index, 2, STEPS))
            with open("/proc/self/maps") as maps:
                num_mapped = sum("elastictrain-" in line and "(deleted)" in line for line in maps)
            masters = {id(piece.master) for piece in engine._found.pieces}
            assert num_mapped == (3 * len(masters) if offload == "nvme" else 0)
            engine.close()
            group.close()
            me.meet()
    return found


def test_the_losses_do_not_tell_where_the_state_lies() -> None:
    ranks = run_team(2, each_way)
    for kind, ways in zip(KINDS, zip(*ranks, strict=True), strict=True):
        device, host, drive = (first | second for first, second in zip(*ways, strict=True))
        assert host == drive, kind
        if kind in ((1, "fp32", {}), (2, "fp32", {})):
            assert device == host, kind
        tolerance = 5e-6 if kind[1] == "fp32" else 5e-3
        for (step, index), loss in device.items():
            # norms are sums over every weight, so they round more
            bound = tolerance if index >= 0 else 20 * tolerance
            assert host[step, index] == pytest.approx(loss, abs=bound), f"{kind}, step {step}, micro-batch {index}"


def test_a_drive_without_room_is_told_before_a_step(tmp_path: Path) -> None:
    master = torch.zeros(1000)
    optimizer = torch.optim.AdamW([master])
    optimizer.state[master] = {"exp_avg": torch.ones(1000), "exp_avg_sq": torch.zeros(1000)}
    piece = Piece("weight", 0, 1000, master, 0)
    with pytest.raises(InfrastructureError, match=r"parallel.offload_path .*nowhere can't hold 4000 bytes"):
        move_to_drive(optimizer, [piece], tmp_path / "nowhere")
    move_to_drive(optimizer, [piece], tmp_path)
    assert os.listdir(tmp_path) == []
    assert optimizer.state[master]["exp_avg"].sum() == 1000


@pytest.mark.parametrize(
    ("parallel", "problem"),
    [
        ({"offload": "cpu", "zero_stage": 0}, "parallel.offload cpu needs parallel.zero_stage 1, 2 or 3"),
        ({"offload": "nvme"}, "parallel.offload nvme needs parallel.offload_path"),
        ({"offload": "cpu", "offload_path": "/fast"}, "parallel.offload_path /fast counts only with"),
    ],
)
def test_what_can_not_be_is_refused_early(parallel: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        TrainConfig.from_dict({"parallel": parallel})
