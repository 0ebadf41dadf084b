"""What a rank does on its training thread: form, train, leave. Holds the engine, the stream and the snapshot writer."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from elastictrain.checkpoint.of_run import checkpoints_of
from elastictrain.checkpoint.replicate import Address, ReplicaClient
from elastictrain.checkpoint.snapshot import SnapshotWriter
from elastictrain.checkpoint.source import memory_source
from elastictrain.config import FaultTarget, TrainConfig
from elastictrain.control.verdict import trusted_step
from elastictrain.data.order import SampleOrder, dropout_seed
from elastictrain.data.samples import RunData
from elastictrain.data.stream import SampleStream
from elastictrain.engine.base import Engine, Phase
from elastictrain.engine.build import build_engine
from elastictrain.engine.compiled import compile_no_more, with_compile_decided
from elastictrain.engine.device import current_device, use_threads
from elastictrain.engine.group import RankGroup, Rendezvous
from elastictrain.engine.out_of_memory import is_out_of_memory
from elastictrain.engine.release import tidy
from elastictrain.engine.schedule import learning_rate
from elastictrain.engine.waits import tell_waits
from elastictrain.engine.warm import WARM_LAYERS, warm
from elastictrain.errors import BadLossError, PeerLostError, StateCorruptedError
from elastictrain.faults import FaultPlan
from elastictrain.plan.layout import Layout
from elastictrain.runtime.bad_steps import BadSteps
from elastictrain.runtime.board import Board
from elastictrain.runtime.evaluate import evaluate
from elastictrain.runtime.protocol import (
    Evaluation,
    FormOrder,
    FormReply,
    RestoreFrom,
    StepRecord,
    pack_records,
)
from elastictrain.runtime.spoiled import SpoiledWorkload
from elastictrain.workloads import build_workload, starting_state

PAUSE = "pause"
MEASURE_EVERY_S = 2.0
"""How often a rank looks how much memory it uses: some 50 us."""
_COLD = (
    "one worker alone has no room for the model, so it could not warm up: its first step will take some seconds more"
)
_NOT_COMPILED = "the model is trained as it is, since it can't be compiled: {}. train.compile=false leaves it so."
TIDY_AFTER_STEPS = 5
"""What an engine of an earlier generation left behind is collected when training runs again, not while it waits."""


class RankProgram:
    """One process's part in the run, over all generations. `abort` and `order` may be called from other threads."""

    def __init__(
        self,
        config: TrainConfig,
        data_folder: Path,
        node: str,
        host: str,
        keeper: Any,
        commit_at: Address,
        token: bytes,
        board: Board,
    ) -> None:
        self._config, self._keeper, self._token, self._board = config, keeper, token, board
        self._commit_at = commit_at
        self._node, self._host = node, host
        self._data = RunData.open(config, data_folder)
        self._order = SampleOrder(len(self._data.train), config.train.seed)
        self._workload = build_workload(config, self._data.vocab_size)
        self._group: RankGroup | None = None
        self._engine: Engine | None = None
        self._stream: SampleStream | None = None
        self._snapshots: SnapshotWriter | None = None
        self._line: ReplicaClient | None = None
        self._unsaid: list[StepRecord] = []
        self._aborted = False
        self._device, self._measured = current_device(), 0.0
        self._orders: deque[str] = deque()
        self._snapshot_every = 1

    def adopt(self, keeper: Any, commit_at: Address) -> None:
        """Commit to another keeper from the next generation on."""
        self._keeper, self._commit_at = keeper, commit_at

    def warm(self, zero_stage: int) -> tuple[str, str]:
        """Make later engines cheap; returns the address of this process's rendezvous, and what there is to say."""
        use_threads(self._config.elastic.cpus_per_worker)
        said = self._compile(zero_stage)
        if not self._config.train.compile:
            try:
                # A single sample: the micro-batch may not fit, and then it is control's to take a leaner layout.
                self._warm_up(zero_stage, 1)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                said = _COLD
        tell_waits(self._board.begin_wait, self._board.end_wait)
        self._rendezvous = Rendezvous.serve(self._host)
        return self._rendezvous.address, said

    def _compile(self, zero_stage: int) -> str:
        """Warm up with compiled blocks, if they are to be; why that can't be, if so."""
        self._config = with_compile_decided(self._config, self._device)
        if not self._config.train.compile:
            return ""
        try:
            self._warm_up(zero_stage, self._config.train.micro_batch)  # kernels are for inputs of this size
        except Exception as error:  # noqa: BLE001 - whatever compilers raise; the model's own comes again without
            self._config = self._config.compiling(False)
            return _NOT_COMPILED.format(f"{type(error).__name__}: {error}".splitlines()[0])
        compile_no_more()
        return ""

    def _warm_up(self, zero_stage: int, samples: int) -> None:
        workload = build_workload(self._config, self._data.vocab_size, WARM_LAYERS)
        warm(workload, self._config, zero_stage, self._data.train.read([0] * samples))

    # --------------------------------------------------------------------------------------------------- formation

    def form(self, order: FormOrder, restore: RestoreFrom, rank: int) -> FormReply:
        """Join the group, build the engine, load the state, prepare the stream and the snapshot buffers."""
        self._aborted = False
        self._orders.clear()
        self._snapshot_every = order.snapshot_every
        self._order_of, self._number, self._first_step = order, rank, restore.step + 1
        self._board.write(order.generation, restore.step, "forming")
        clock = _Clock()
        layout = order.layout
        self._group = RankGroup(order.rendezvous, order.generation, rank, layout.world_size)
        self._group.form()
        clock.lap("rendezvous")
        self._faults = FaultPlan(order.faults, rank, self._announce, self._flip_bit)
        self._adapt(layout)
        workload = self._workload
        if any(fault.kind == "nan" for _, fault in order.faults):
            workload = SpoiledWorkload(workload, self._faults.nan_due)
        loads_next = restore.source != "fresh"
        engine = self._engine = build_engine(workload, self._config, layout, self._group, loads_next=loads_next)
        clock.lap("engine")
        store = checkpoints_of(self._config)
        if restore.source == "memory":
            shards = [replace(s, address=None) if s.stored.where == self._node else s for s in restore.shards]
            engine.import_state(memory_source(shards, self._token))
        elif restore.source == "durable":
            engine.import_state(store.open(restore.step))
        elif (beginning := starting_state(self._config, engine.tensors())) is not None:
            engine.import_state(beginning)
        clock.lap("restore")
        self._bad_steps = BadSteps(self._config, order.seen, engine, self._group, store)
        self._line = ReplicaClient(self._commit_at, self._token)
        attached = self._keeper.attach.remote(order.generation, rank, layout.world_size, engine.shard_index())
        self._stream = SampleStream(self._data.train, self._order, layout, rank, self._first_step)
        self._snapshots = SnapshotWriter(
            ray.get(attached), order.generation, rank, layout.world_size, self._line.commit
        )
        return FormReply(clock.laps, engine.tensors() if rank == 0 else ())

    def _adapt(self, layout: Layout) -> None:
        """Have the model built as the layout wants it."""
        if layout.recompute != (self._config.train.activation_checkpointing or "none"):
            self._config = self._config.under(layout)
            self._workload = build_workload(self._config, self._data.vocab_size)

    def _announce(self, index: int, step: int) -> None:
        ray.get(self._keeper.announce.remote(index, step, self._number))

    def _flip_bit(self, where: FaultTarget) -> None:
        if self._engine is not None:
            self._engine.witness.flip_bit(where)

    # ---------------------------------------------------------------------------------------------------- training

    def train(self) -> int:
        """Train from the first step to the last, or to a pause; returns the last step done."""
        config, engine, stream, snapshots, group = (
            self._config,
            self._engine,
            self._stream,
            self._snapshots,
            self._group,
        )
        if engine is None or stream is None or snapshots is None or group is None:
            raise PeerLostError("this rank has left its group")
        self._unsaid = []
        self._workload.take_gauges()  # of a warm-up, or of a step that broke off
        step, paused = self._first_step - 1, False
        if self._verified(step):
            engine.witness.seal()
        tidy_at = self._first_step + TIDY_AFTER_STEPS
        while step < config.train.steps and not paused:
            step += 1
            try:
                self._unsaid.append(self._step(step, engine, stream, snapshots))
            except BadLossError:
                self._keep(step - 1, engine, snapshots, group)
                raise
            self._measure()
            paused = self._hear(group.news(step))
            due = step % self._snapshot_every == 0 or step % config.checkpoint.every == 0
            if due or paused or step == config.train.steps:
                self._snapshot(step, engine, snapshots)
            if step == tidy_at:
                tidy()
        snapshots.wait()
        self._board.write(self._order_of.generation, step, "idle")
        return step

    def _step(self, step: int, engine: Engine, stream: SampleStream, snapshots: SnapshotWriter) -> StepRecord:
        seed, generation = self._config.train.seed, self._order_of.generation
        begun_at, blocked_s = time.time(), self._board.blocked_s
        self._board.write(generation, step, "data")
        batches = next(stream)
        stall_s, announced, num_backward = 0.0, False, 0

        def on_phase(phase: Phase) -> None:
            nonlocal num_backward
            self._board.write(generation, step, phase)
            if self._aborted:
                raise PeerLostError(f"generation {generation} was fenced")
            self._faults.strike(step, phase)
            num_backward += phase == "backward"
            if self._order_of.layout.zero_stage == 0 and phase == "backward" and num_backward == len(batches):
                # Without sharding the update has no collective, so this gradient reduction is the last one between
                # waiting for a snapshot and beginning the next: see checkpoint.snapshot.
                before_reduction()

        def before_reduction() -> None:
            nonlocal stall_s, announced
            self._board.write(generation, step, "waiting")
            stall_s += snapshots.wait()
            if self._orders and not announced and self._group is not None:
                # no rank ends this step without rank 0, which comes here first: all hear of it after the same step
                self._group.announce(step, self._take_orders())
            announced = True

        def before_update() -> None:
            before_reduction()
            if self._verified(step - 1):
                self._verify(step - 1, engine, snapshots)

        rate = learning_rate(self._config.train, step)
        result = engine.train_step(
            [(dropout_seed(seed, step, micro.global_index), batch) for micro, batch in batches],
            learning_rate=rate,
            loss_limit=self._bad_steps.loss_limit,
            before_update=before_update,
            on_phase=on_phase,
        )
        if not result.updated:
            self._board.write(generation, step, "waiting")
        skipped = self._bad_steps.settle(step, result)
        if self._verified(step):
            engine.witness.seal()
        told = batches if result.losses else []  # of the ranks that hold a replica together, one tells
        micro_batches = tuple(
            (micro.global_index, loss, micro.samples) for (micro, _), loss in zip(told, result.losses, strict=True)
        )
        num_tokens = sum(self._workload.num_tokens(batch) for _, batch in told)
        return StepRecord(
            step=step,
            micro_batches=micro_batches,
            num_tokens=num_tokens,
            begun_at=begun_at,
            finished_at=time.time(),
            learning_rate=rate,
            grad_norm=result.grad_norm,
            data_wait_s=stream.last_wait_s,
            snapshot_stall_s=stall_s,
            blocked_s=self._board.blocked_s - blocked_s,
            skipped=skipped,
            gauges=self._workload.take_gauges(),
        )

    def _measure(self) -> None:
        now = time.monotonic()
        if now > self._measured + MEASURE_EVERY_S:
            self._measured = now
            self._board.write_memory(self._device.memory_in_use())

    def _verified(self, step: int) -> bool:
        """Whether the state after this step is verified before the next update."""
        every = self._config.elastic.verify_every
        return every > 0 and step % every == 0

    def _verify(self, step: int, engine: Engine, snapshots: SnapshotWriter) -> None:
        last = snapshots.last
        verdict = engine.witness.verify(last.checksum if last is not None and last.step == step else None)
        if verdict is not None:
            every, restored = self._config.elastic.verify_every, self._first_step - 1
            trusted = trusted_step(step, every, restored, verdict.snapshot_sound)
            raise StateCorruptedError(verdict.problem, verdict.ranks, trusted)

    def _snapshot(self, step: int, engine: Engine, snapshots: SnapshotWriter) -> None:
        order = self._order_of
        self._board.write(order.generation, step, "snapshot")
        self._faults.strike(step, "snapshot")
        snapshots.begin(step, engine.export_into, engine.scalars(), pack_records(self._unsaid))
        self._unsaid = []

    def _keep(self, step: int, engine: Engine, snapshots: SnapshotWriter, group: RankGroup) -> None:
        """Before a stop: see that the keepers have all ranks' state after this step, which is the engine's still."""
        if self._unsaid:
            self._snapshot(step, engine, snapshots)
        snapshots.wait()
        self._board.write(self._order_of.generation, step + 1, "waiting")
        group.meet()

    def order(self, generation: int, news: str) -> None:
        """Announce `pause`, or a new `snapshot_every`, to all ranks in the next update.

        For rank 0, which all of them wait for in each step.
        """
        if self._order_of.generation == generation:
            self._orders.append(news)

    def _take_orders(self) -> str:
        taken = [self._orders.popleft() for _ in range(len(self._orders))]
        return " ".join(taken)

    def _hear(self, news: str) -> bool:
        """Follow what rank 0 has announced; whether that is a pause."""
        for order in news.split():
            if order != PAUSE:
                self._snapshot_every = int(order)
        return PAUSE in news.split()

    # ----------------------------------------------------------------------------------------------------- leaving

    def abort(self) -> None:
        """Break whatever collective the training thread is in."""
        self._aborted = True
        if self._engine is not None:
            self._engine.fence()
        if self._group is not None:
            self._group.abort()

    def fall_silent(self) -> None:
        """Have the copy in flight finished, and write no more of this generation's state."""
        for part in (self._snapshots, self._line):
            if part is not None:
                part.close()
        self._snapshots = self._line = None

    def leave(self) -> None:
        """Drop everything of the generation but the process."""
        for part in (self._stream, self._engine, self._group):
            if part is not None:
                part.close()
        self._stream = self._engine = self._group = None

    def evaluate(self, step: int, micro_batch: int) -> Evaluation:
        """The model of a durable checkpoint on held-out text."""
        state = checkpoints_of(self._config).open(step)
        return evaluate(self._workload, self._config, self._data.manifest, state, micro_batch)


class _Clock:
    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name], self._last = now - self._last, now
