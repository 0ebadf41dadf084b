"""A run told step by step, on a clock that the teller moves: events for tests, with no cluster behind them."""

from __future__ import annotations

import hashlib
import math

from elastictrain.config import TrainConfig
from elastictrain.events import (
    Cause,
    CheckpointFailed,
    CheckpointRejected,
    CheckpointRemoved,
    CheckpointWritten,
    DataReady,
    Evaluated,
    Event,
    FailureDetected,
    FaultInjected,
    GenerationStarted,
    LayoutChosen,
    Member,
    NodeLoad,
    NodesMeasured,
    RanksTimed,
    Recovered,
    RunEnded,
    RunStarted,
    Skip,
    StepCommitted,
    Warned,
    WorkerStarted,
)

START_AT = 1_790_000_000.0


class Story:
    """Each method appends what happened and moves the clock; `events` is the journal so far."""

    def __init__(self, run: str = "demo", overrides: tuple[str, ...] = ()) -> None:
        self.events: list[Event] = []
        self.clock = START_AT
        self.run = run
        self.config = TrainConfig.load(None, [f"run.name={run}", *overrides]).to_dict()
        self.attempt = self.generation_index = self.step = 0
        self.world_size = 2
        self.layout: dict[str, int] = {}
        self.chain = ""

    def tell(self, event: Event) -> None:
        self.events.append(event)

    def start(self, startup_s: float = 6.0, data: bool = False) -> Story:
        self.attempt += 1
        environment = {"python": "3.11", "torch": "2.13.0", "host": "example"}
        self.tell(RunStarted(self.clock, self.run, self.attempt, self.config, environment))
        if data:
            self.tell(DataReady(self.clock + 1, "runs/data", "d" * 64, 20_000, 256, 0.9, reused=False))
        for rank in range(self.world_size):
            self.tell(WorkerStarted(self.clock + 2, f"worker-{rank}", f"node-{rank}", 4000 + rank, 1.5))
        self.clock += startup_s
        return self

    def generation(self, world_size: int = 2, first_step: int | None = None, cause: str = "start") -> Story:
        self.generation_index += 1
        self.world_size = world_size
        first_step = self.step + 1 if first_step is None else first_step
        self.step = first_step - 1
        layout = {"dp": world_size, "zero_stage": 1, "micro_batch": 4, "accumulation": 4 // world_size}
        members = tuple(Member(r, f"worker-{r}", 4000 + r, f"node-{r}") for r in range(world_size))
        source = {"start": "fresh", "resume": "durable"}.get(cause, "memory")
        phases_s = {"fence": 0.01, "rendezvous": 0.005, "engine": 0.03, "restore": 0.04}
        self.tell(
            GenerationStarted(
                at=self.clock,
                index=self.generation_index,
                layout=layout,
                world_size=world_size,
                first_step=first_step,
                cause=cause,
                source=source,
                continuation="bit_exact",
                members=members,
                phases_s=phases_s,
            )
        )
        if layout != self.layout:
            self.layout, runner_up = layout, "dp1 zero1 2x2: 20 % slower: more fixed (0.1 s)"
            why = "it needs 0.4 of 8 GB; nothing is known to be faster"
            self.tell(LayoutChosen(self.clock, self.generation_index, layout, why, runner_up, 400_000_000, 0.5))
        return self

    def steps(self, count: int, step_s: float = 0.5, loss: float | None = None, skipped: Skip | None = None) -> Story:
        for _ in range(count):
            self.step += 1
            self.chain = hashlib.sha256(f"{self.chain}{self.step}".encode()).hexdigest()
            noise = 0.08 * math.sin(self.step * 12.9898) * math.cos(self.step * 4.1414)
            self.tell(
                StepCommitted(
                    at=self.clock + step_s + 0.02,
                    generation=self.generation_index,
                    step=self.step,
                    loss=2.4 + 5.2 * math.exp(-self.step / 45) + noise if loss is None else loss,
                    sample_chain=self.chain,
                    num_samples=16,
                    num_tokens=2048,
                    begun_at=self.clock,
                    finished_at=self.clock + step_s,
                    learning_rate=3e-3,
                    grad_norm=1.25,
                    data_wait_s=0.004,
                    snapshot_stall_s=0.002,
                    skipped=skipped,
                )
            )
            self.clock += step_s + 0.01
        return self

    def timed(self, num_steps: int = 10) -> Story:
        """So many of the last steps, timed rank by rank; the last rank is slower, and slower still as time goes by."""
        first = self.step - num_steps + 1
        own_s = (*(0.2 + 0.001 * rank for rank in range(self.world_size - 1)), 0.24 + self.step * 4e-4)
        begun_at = self.clock - num_steps * 0.51
        self.tell(RanksTimed(self.clock, begun_at, self.generation_index, first, self.step, own_s))
        return self

    def measured(self) -> Story:
        """How busy the nodes are."""
        loads = tuple(NodeLoad(f"node#{n}", 0.25 + n / 2, 2_000_000_000, 8_000_000_000) for n in range(2))
        memory = tuple(300_000_000 + 40_000_000 * rank for rank in range(self.world_size))
        self.tell(NodesMeasured(self.clock, self.step, loads, memory))
        return self

    def kill(self, rank: int = 1, partial_s: float = 0.2, detect_s: float = 0.05, injected: bool = False) -> Story:
        """A worker dies `partial_s` into the next step."""
        if injected:
            self.tell(FaultInjected(self.clock + partial_s - 0.001, 0, self.step + 1, rank, "kill"))
        self.clock += partial_s
        self.tell(
            FailureDetected(
                at=self.clock,
                detected_at=self.clock + detect_s,
                generation=self.generation_index,
                kind="worker_lost",
                ranks=(rank,),
                node=f"node-{rank}",
                pid=4000 + rank,
                cause=Cause("signal", "SIGKILL"),
                step=self.step + 1,
            )
        )
        self.clock += detect_s
        return self

    def bug(self, rank: int = 0) -> Story:
        """The user's code raises in the next step."""
        traceback = 'Traceback (most recent call last):\n  File "model.py", line 7\nValueError: <b>bad</b> & 1'
        self.clock += 0.1
        cause = Cause("exception", "ValueError: <b>bad</b> & 1", traceback, "ValueError")
        self.tell(
            FailureDetected(
                at=self.clock,
                detected_at=self.clock + 0.01,
                generation=self.generation_index,
                kind="user_error",
                ranks=(rank,),
                node=f"node-{rank}",
                pid=4000 + rank,
                cause=cause,
                step=self.step + 1,
            )
        )
        self.clock += 0.01
        return self

    def recover(self, recovery_s: float = 0.4, world_size: int = 2, step_s: float = 0.5, lost: int = 1) -> Story:
        """A new generation takes over where the last one lost `lost` steps, the one in flight among them."""
        self.clock += recovery_s
        self.generation(world_size, self.step + 2 - lost, cause="worker_lost: rank 1, SIGKILL")
        first_step = self.step + 1
        self.steps(1, step_s)
        self.tell(Recovered(self.clock, self.generation_index, first_step, lost, "memory", "bit_exact"))
        return self

    def inherit(self, down_s: float = 20.0, untold: int = 2, lost: int = 1, startup_s: float = 4.0) -> Story:
        """The driver is killed, `untold` steps after the last that it told of, and the next one resumes from memory."""
        died_at, step = self.clock, self.step
        kept = len(self.events)
        self.steps(untold)
        steps, self.events = self.events[kept:], self.events[:kept]
        self.wait(down_s).start(startup_s)
        cause = Cause("unknown", "the driver went without a word")
        died = FailureDetected(
            died_at, self.clock, self.generation_index, "driver_lost", (), "example", 77, cause, step + 1
        )
        self.tell(died)
        self.events += steps
        self.generation(self.world_size, self.step + 1, cause="resume")
        first_step = self.step + 1
        self.steps(1)
        self.tell(Recovered(self.clock, self.generation_index, first_step, lost, "memory", "bit_exact"))
        return self

    def checkpoint(self, removed: bool = False) -> Story:
        uri = f"runs/{self.run}/checkpoints/step-{self.step:08d}"
        self.tell(
            CheckpointWritten(
                at=self.clock,
                step=self.step,
                uri=uri,
                num_bytes=12_000_000,
                sha256=hashlib.sha256(uri.encode()).hexdigest(),
                seconds=0.3,
                samples=self.step * 16,
                sample_chain=self.chain,
                loss=3.0,
                layout={"dp": self.world_size, "zero_stage": 1, "micro_batch": 4, "accumulation": 2},
            )
        )
        if removed:
            self.tell(CheckpointRemoved(self.clock, self.step, uri))
        return self

    def trouble(self) -> Story:
        """Everything that is only told: a warning, a checkpoint that failed, one that was rejected."""
        self.tell(Warned(self.clock, "tracking", "MLflow at http://me:secret@127.0.0.1:1 does not answer"))
        self.tell(CheckpointFailed(self.clock, self.step, "No space left on device"))
        self.tell(CheckpointRejected(self.clock, self.step, "runs/demo/checkpoints/bad", "sha256 of shard 0 differs"))
        return self

    def evaluate(self, seconds: float = 1.0) -> Story:
        self.clock += seconds
        self.tell(Evaluated(self.clock, self.step, 2.31, 1.93, 2.21, 400_000, "def main():\n    return 1\n"))
        return self

    def end(self, status: str = "complete", cause: Cause | None = None, shutdown_s: float = 0.5) -> Story:
        self.clock += shutdown_s
        self.tell(RunEnded(self.clock, status, self.step, cause))
        return self

    def wait(self, seconds: float) -> Story:
        """Time in which nothing is told."""
        self.clock += seconds
        return self


def full_story(run: str = "demo") -> Story:
    """A run in which everything happens: two kills, a crash of the driver, a resume, an end."""
    story = (
        Story(run)
        .start(data=True)
        .generation()
        .steps(50)
        .timed(50)
        .measured()
        .checkpoint(removed=True)
        .steps(30)
        .timed(30)
    )
    story.kill(injected=True).recover().steps(19).timed().checkpoint().steps(20)
    story.trouble().kill(rank=0).recover(recovery_s=0.9, world_size=1).steps(9)
    story.wait(12)
    story.start(startup_s=4.0).generation(world_size=2, first_step=101, cause="resume").steps(60).timed(60).checkpoint()
    story.steps(19).steps(1, skipped=Skip("spike", 3.2, 161)).steps(20).checkpoint()
    return story.evaluate().end()
