"""The real control plane over as many processes as a machine holds: supervisor, keepers and Ray, workers without torch.

A local cluster of some nodes; all ranks come up, one is killed, a node is lost, a node comes back, and the group is
formed anew each time. Measured are the seconds of each, every decision of `advance` against its bar, the live status,
and how many messages the driver sends. What it asks all nodes at a fixed pace, however many ranks there are (`poll`,
`progress`, `load`), is not counted; nor are Ray's own calls that start and end a process.

    python benchmarks/control_plane.py --live                 100 workers on 4 nodes; minutes, most of them starts
    python benchmarks/control_plane.py --live --ranks 40      fewer
"""

from __future__ import annotations

import json
import os
import secrets
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from math import lcm
from pathlib import Path
from typing import Any

import machine
import psutil
from control_plane import BAR_S, Stopwatch
from figures import table
from two_nodes import Nodes, local_nodes

from elastictrain.checkpoint.of_run import checkpoints_of
from elastictrain.config import TrainConfig
from elastictrain.events import Event, FailureDetected, GenerationStarted, WorkerStarted
from elastictrain.plan.auto import Choice
from elastictrain.plan.layout import Layout
from elastictrain.status import Status

PATIENCE_S = 900.0
PACED = {"poll", "progress", "load"}
SETTLE_S = 1.0
"""After a group is formed: its ranks are told to train then."""
LOOKS = 20
"""At the live status, one after the other."""
_LEAN = {
    "GLIBC_TUNABLES": "",
    "MALLOC_TOP_PAD_": "131072",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_worker_register_timeout_seconds": "600",
}
"""A training process takes memory in large pieces, has a core to start on, and shares its node with few others: here
that would be some gigabytes, a hundred idle processes more, and processes given up on while they start."""


class Messages:
    """Counts the calls of actors that this process makes while `counted`, by what is going on."""

    def __init__(self) -> None:
        self.phase = "start"
        self.sent: dict[str, Counter[tuple[str, str]]] = {}
        """By phase: how many of which method to which actor."""

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Ray has one place where a call of an actor leaves a process."""
        from ray.actor import ActorHandle

        send = ActorHandle._actor_method_call

        def count(handle: Any, method_name: str, *args: Any, **options: Any) -> Any:
            self.sent.setdefault(self.phase, Counter())[handle._actor_id.hex(), method_name] += 1
            return send(handle, method_name, *args, **options)

        ActorHandle._actor_method_call = count
        try:
            yield
        finally:
            ActorHandle._actor_method_call = send

    def told(self, phase: str, keepers: set[str]) -> dict[str, Any]:
        """Of the phase: the most that one keeper got, and all that workers got, by method."""
        sent = {key: count for key, count in self.sent.get(phase, Counter()).items() if key[1] not in PACED}
        of_keeper = Counter[str]()
        direct = Counter[str]()
        for (actor, method), count in sent.items():
            if actor in keepers:
                of_keeper[actor] += count
            else:
                direct[method] += count
        return {"most_to_a_keeper": max(of_keeper.values(), default=0), "to_workers": dict(direct)}


class Story:
    """The events so far, which a thread can wait for."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._changed = threading.Condition()
        self._over = False

    def close(self) -> None:
        """There are no more."""
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def emit(self, event: Event) -> None:
        """One more."""
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()

    def until(self, what: str, find: Callable[[list[Event]], Any]) -> Any:
        """What `find` finds, as soon as it does; raises TimeoutError after a long while, or when the run is over."""
        deadline = time.monotonic() + PATIENCE_S
        with self._changed:
            while not (found := find(self.events)):
                if self._over or not self._changed.wait(deadline - time.monotonic()):
                    raise TimeoutError(f"no {what} within {PATIENCE_S:.0f} s; the last events: {self.events[-3:]}")
        return found

    def group_of(self, size: int, after: int) -> GenerationStarted:
        """The first generation of so many ranks that comes after this many events."""

        def find(events: list[Event]) -> GenerationStarted | None:
            found = (e for e in events[after:] if isinstance(e, GenerationStarted) and e.world_size == size)
            return next(found, None)

        group: GenerationStarted = self.until(f"group of {size}", find)
        return group

    def failure(self, after: int) -> FailureDetected:
        """The first one after this many events."""

        def find(events: list[Event]) -> FailureDetected | None:
            return next((e for e in events[after:] if isinstance(e, FailureDetected)), None)

        failed: FailureDetected = self.until("failure", find)
        return failed


def measure(ranks: int, num_nodes: int) -> dict[str, Any]:
    """Play it through with `ranks` workers on `num_nodes` nodes."""
    found: dict[str, Any] = {"machine": machine.describe(), "ranks": ranks, "nodes": num_nodes, "bar_s": BAR_S}
    here = str(Path(__file__).parent)  # where a node's Python finds the light worker
    os.environ |= _LEAN | {"PYTHONPATH": os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])}
    with tempfile.TemporaryDirectory(prefix="control-") as folder, local_nodes(num_nodes, ranks // num_nodes) as nodes:
        import ray  # after `local_nodes` has set its environment

        ray.init(address=nodes.address, logging_level="error", log_to_driver=False)
        try:
            return found | _Play(ranks, num_nodes, nodes, Path(folder)).run()
        finally:
            ray.shutdown()


class _Play:
    """One run, and what happens to it."""

    def __init__(self, ranks: int, num_nodes: int, nodes: Nodes, folder: Path) -> None:
        from light_worker import LightActor

        from elastictrain.data.order import EMPTY_CHAIN
        from elastictrain.runtime import roster, supervisor
        from elastictrain.runtime.fleet import Fleet
        from elastictrain.runtime.home import RunHome
        from elastictrain.runtime.live import Live
        from elastictrain.runtime.protocol import RestoreFrom
        from elastictrain.runtime.resume import StartPoint

        self.ranks, self.nodes, self.watch, self.messages, self.story = ranks, nodes, Stopwatch(), Messages(), Story()
        on_node = ranks // num_nodes
        self.smaller = ranks - on_node
        global_batch = on_node * lcm(*range(1, num_nodes + 1))  # for any number of nodes
        config = TrainConfig.from_dict(
            {
                "run": {"name": "live", "storage": str(folder)},
                "train": {"steps": 10**6, "micro_batch": 1, "global_batch": global_batch},
                "elastic": {
                    "min_workers": on_node,
                    "max_workers": ranks,
                    "standby": 0,
                    "replace_timeout_s": PATIENCE_S,
                },
            }
        )
        plan = {size: Choice(Layout(size, 1, 1, 1)) for size in range(on_node, ranks + 1, on_node)}
        self.home, self.keepers = RunHome(config), set[str]()
        self.fleet = Fleet(config, secrets.token_bytes(32), worker_actor=LightActor)
        live = Live(config, 1, 0, time.time(), self.home.write_status)
        publish = live.publish
        live.publish = lambda *given, **options: self.watch.time(  # type: ignore[method-assign]
            "status: published when it is due", lambda: publish(*given, **options)
        )
        start = StartPoint(RestoreFrom("fresh", 0), EMPTY_CHAIN, None, 0, frozenset(), None)
        roster.START_TIMEOUT_S = PATIENCE_S  # all of them share these few cores
        watched = vars(supervisor)  # the function as it sees it
        advance = watched["advance"]
        watched["advance"] = lambda state, seen, now: self.watch.time(
            f"decision: {type(seen).__name__}", lambda: advance(state, seen, now)
        )
        self.supervisor = supervisor.Supervisor(
            config, self.fleet, str(folder), checkpoints_of(config), start, (plan,), live, self.story.emit
        )

    def run(self) -> dict[str, Any]:
        """What happens comes from this thread, since Ray wants the first for a new node; the supervisor has one too."""
        with self.messages.counted(), ThreadPoolExecutor(1, "supervisor") as pool:
            self.begun = time.time()
            running = pool.submit(self._supervise)
            try:
                return self._play()
            finally:
                self.supervisor.stop("the play is over")
                running.result()
                self.fleet.close()

    def _supervise(self) -> None:
        try:
            self.supervisor.run()
        finally:
            self.story.close()

    def _play(self) -> dict[str, Any]:
        acts = {"start": self._start()}
        status = self._look_at_status()
        memory = sum(_own_bytes(member.pid) for member in self.group.members) / self.ranks
        acts["a worker is killed"] = self._kill()
        acts["a node is lost"] = self._lose_node()
        acts["a node comes"] = self._gain_node()
        calls = {
            name: {"calls": len(taken), "median_s": sorted(taken)[len(taken) // 2], "worst_s": max(taken)}
            for name, taken in self.watch.taken.items()
        }
        return {"acts": acts, "calls": calls, "status": status, "worker_bytes": memory}

    def _start(self) -> dict[str, Any]:
        self.group = self.story.group_of(self.ranks, 0)
        ready = [e.at for e in self.story.events if isinstance(e, WorkerStarted)]
        return self._act("start", self.begun, 0.0, max(ready) - self.begun)

    def _kill(self) -> dict[str, Any]:
        self.messages.phase, before = "a worker is killed", len(self.story.events)
        at = time.time()
        psutil.Process(self.group.members[self.ranks // 2].pid).kill()
        return self._after_failure("a worker is killed", at, before, self.ranks)

    def _lose_node(self) -> dict[str, Any]:
        self.messages.phase, before = "a node is lost", len(self.story.events)
        doomed = next(m.pid for m in reversed(self.group.members) if not self.nodes.on_head(m.pid))
        at = time.time()
        self.nodes.kill_node_of(doomed)
        return self._after_failure("a node is lost", at, before, self.smaller)

    def _gain_node(self) -> dict[str, Any]:
        self.messages.phase, before = "a node comes", len(self.story.events)
        self.nodes.replace_dead()
        at = time.time()
        self.group = self.story.group_of(self.ranks, before)
        ready = max(e.at for e in self.story.events[before:] if isinstance(e, WorkerStarted))
        return self._act("a node comes", at, 0.0, ready - at)

    def _after_failure(self, name: str, at: float, before: int, size: int) -> dict[str, Any]:
        known_s = self.story.failure(before).detected_at - at
        self.group = self.story.group_of(size, before)
        place_s = self.group.phases_s["place"]
        return self._act(name, at, known_s, place_s)

    def _act(self, name: str, begun: float, known_s: float, start_s: float) -> dict[str, Any]:
        """Seconds of it, those in which processes start apart, and the messages from its beginning on."""
        time.sleep(SETTLE_S)
        self.keepers |= {node.keeper._actor_id.hex() for node in self.fleet.nodes.values()}
        total_s = self.group.at - begun
        return {
            "ranks": self.group.world_size,
            "known_s": known_s,
            "processes_s": start_s,
            "control_s": total_s - known_s - start_s,
            "total_s": total_s,
            "messages": self.messages.told(name, self.keepers),
        }

    def _look_at_status(self) -> dict[str, float]:
        """As `elastictrain status` reads it."""
        for _ in range(LOOKS):
            self.watch.time("status: read", self._read_status)
        return {"ranks": len(self._read_status().workers)}

    def _read_status(self) -> Status:
        return Status.from_json(json.loads(self.home.status() or b"{}"))


def _own_bytes(pid: int) -> int:
    """What the process has for itself."""
    return int(psutil.Process(pid).memory_full_info().uss)


def told(result: dict[str, Any]) -> str:
    """The result as tables for people."""
    acts = [
        [
            f"{name}: {act['ranks']} ranks",
            *(f"{act[key]:.2f}" for key in ("known_s", "control_s", "processes_s", "total_s")),
            str(act["messages"]["most_to_a_keeper"]),
            " ".join(f"{count} {method}" for method, count in act["messages"]["to_workers"].items()) or "0",
        ]
        for name, act in result["acts"].items()
    ]
    calls = [
        [name, str(call["calls"]), f"{1000 * call['median_s']:.2f}", f"{1000 * call['worst_s']:.2f}"]
        for name, call in sorted(result["calls"].items(), key=lambda item: -item[1]["worst_s"])
    ]
    worst = max(call["worst_s"] for name, call in result["calls"].items() if name.startswith("decision"))
    header = ["", "known s", "control s", "processes s", "total s", "to each host", "to workers"]
    return "\n".join(
        [
            machine.line(result["machine"]),
            f"{result['ranks']} workers on {result['nodes']} nodes, {result['worker_bytes'] / 2**20:.0f} MiB each",
            "",
            table(header, acts),
            "",
            table(["", "calls", "median ms", "worst ms"], calls),
            "",
            f"worst decision: {1000 * worst:.1f} ms, bar {1000 * result['bar_s']:.0f} ms",
        ]
    )
