"""One flipped bit is found before the next update, in the right rank; clean training raises no alarm. About 40 s.

Two or three ranks with real engines over gloo, for each ZeRO stage and dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ranks import Rank, run_team
from training import FolderSource, micro_batch, save_shard, train_config, workload

from elastictrain.checkpoint.checksum import checksum
from elastictrain.config import FaultTarget
from elastictrain.control.verdict import Verdict
from elastictrain.engine.build import build_engine
from elastictrain.engine.zero import ZeroEngine

CLEAN_STEPS = 20
KINDS = [(stage, dtype) for stage in range(4) for dtype in ("fp32", "bf16")]
SPLIT = [
    (0, "fp32", "pp"),
    (1, "fp32", "pp"),
    (1, "bf16", "pp"),
    (0, "fp32", "tp"),
    (1, "bf16", "tp"),
    (2, "fp32", "sp"),
]
EXPERTS = [(1, "fp32", "ep"), (2, "bf16", "ep")]
"""With what is 2."""


ALL = [*KINDS, *SPLIT, *EXPERTS[:1]]
Kind = tuple[int, str] | tuple[int, str, str]


class Training:
    """One rank that trains as the runtime does: seal, snapshot, verify before the next update."""

    def __init__(
        self, me: Rank, generation: int, world_size: int, stage: int, dtype: str, degree: str | None = None
    ) -> None:
        # with four replicas a step of eight sequences comes out whole
        batch = {"global_batch": 8} if (degree, world_size) == ("ep", 4) else {}
        config = train_config(stage, dtype, degrees={degree: 2} if degree else None, **batch)
        self._group = me.group(generation, range(world_size))
        self._group.form()
        self.engine: ZeroEngine = build_engine(workload(config), config, config.layout(world_size), self._group)
        self.engine.witness.seal()
        layout = config.layout(world_size)
        replica, each = layout.place(me.index).dp, layout.accumulation
        self._mine = range(replica * each, (replica + 1) * each)
        self._step = 0
        self._exported: str | None = None

    def step(self, before_backward: Callable[[], None] = lambda: None) -> Verdict | None:
        """One step; what is found right before its update."""
        found: list[Verdict | None] = []
        self._step += 1
        self.engine.train_step(
            [micro_batch(self._step, index) for index in self._mine],
            learning_rate=1e-3,
            before_update=lambda: found.append(self.engine.witness.verify(self._exported)),
            on_phase=lambda phase: before_backward() if phase == "backward" else None,
        )
        self.engine.witness.seal()
        self.snapshot()
        [verdict] = found
        return verdict

    def snapshot(self) -> None:
        """Copy the shard, as the snapshot's thread does."""
        buffer = memoryview(bytearray(self.engine.shard_index().num_bytes))
        self.engine.export_into(buffer)
        self._exported = checksum(buffer)

    def close(self) -> None:
        """Leave."""
        self.engine.close()
        self._group.close()


def clean(me: Rank, folder: Path) -> list[Any]:
    """Twenty steps of every kind, an import, and one more; what was found."""
    found = []
    for generation, kind in enumerate(ALL):
        training = Training(me, generation, 2, *kind)
        found.append([training.step() for _ in range(CLEAN_STEPS)])
        save_shard(training.engine, folder / f"{generation}", me.index)
        me.meet()
        training.step()
        training.engine.import_state(FolderSource(folder / f"{generation}"))
        training.engine.witness.seal()
        training.snapshot()
        found[-1].append(training.step())
        training.close()
        me.meet()
    return found


def test_clean_training_raises_no_alarm(tmp_path: Path) -> None:
    assert run_team(2, clean, tmp_path) == [[[None] * (CLEAN_STEPS + 1)] * len(ALL)] * 2


def flipped(me: Rank, world_size: int, kinds: list[Kind]) -> dict[tuple[Kind, str, int], list[Any]]:
    """Each kind, each target, each rank: two clean steps, and a third in which that rank's memory changes."""
    found: dict[tuple[Kind, str, int], list[Any]] = {}
    targets: tuple[FaultTarget, ...] = ("weights", "optimizer")
    for kind in kinds:
        for where in targets:
            for odd in range(world_size):
                training = Training(me, len(found), world_size, *kind)
                clean = [training.step(), training.step()]
                pending = [where] if odd == me.index else []

                def strike(training: Training = training, pending: list[FaultTarget] = pending) -> None:
                    while pending:
                        training.engine.witness.flip_bit(pending.pop())

                found[kind, where, odd] = [*clean, training.step(strike)]
                training.close()
                me.meet()
    return found


@pytest.mark.parametrize(
    ("world_size", "kinds"),
    [
        (2, KINDS),
        (3, [(1, "bf16"), (0, "fp32")]),
        (1, [(1, "fp32")]),
        (2, SPLIT),
        (4, SPLIT[1:4]),
        (2, EXPERTS),
        (4, EXPERTS[:1]),
    ],
)
def test_a_flip_is_found_in_the_right_rank(world_size: int, kinds: list[Kind]) -> None:
    first, *others = run_team(world_size, flipped, world_size, kinds)
    assert all(other == first for other in others), "all ranks come to the same verdict"
    assert len(first) == len(kinds) * 2 * world_size
    for (kind, where, odd), (one, two, verdict) in first.items():
        assert one is two is None
        case = f"{kind} {where} rank {odd} of {world_size}: {verdict}"
        assert verdict is not None, case
        assert verdict.ranks == (odd,), case
        assert f"rank {odd}" in verdict.problem, case
        assert verdict.snapshot_sound, case


def expert_flipped(me: Rank) -> list[Any]:
    """A weight of an expert that two of four ranks hold, in one of them."""
    training = Training(me, 0, 4, 1, "fp32", "ep")
    found = [training.step()]

    def strike() -> None:
        if me.index == 2:
            weights = dict(training.engine._module.named_parameters())["blocks.1.mlp.experts.1.up.weight"]
            weights.data[3, 5] *= 2

    found.append(training.step(strike))
    training.close()
    me.meet()
    return found


def test_an_expert_is_compared_with_its_other_copy() -> None:
    [clean, verdict], *others = run_team(4, expert_flipped)
    assert others == [[clean, verdict]] * 3
    assert clean is None
    assert verdict.ranks == (2,)
    assert "blocks.1.mlp.experts.1.up.weight" in verdict.problem


def copied_wrong(me: Rank) -> list[Any]:
    """The shard changes after the update and before its snapshot is made."""
    training = Training(me, 0, 2, 1, "fp32")
    found = [training.step()]
    if me.index == 1:
        training.engine.witness.flip_bit("optimizer")
        training.snapshot()
    found.append(training.step())
    training.close()
    me.meet()
    return found


def test_a_snapshot_of_what_changed_is_not_trusted() -> None:
    first, second = run_team(2, copied_wrong)
    assert first == second
    assert first[0] is None
    assert first[1].ranks == (1,)
    assert not first[1].snapshot_sound
