"""Random short sequences of faults, each in a run of its own on real Ray, gloo and DeepSpeed.

What the property tests of the state machine show for thousands of cases is seen to hold for the whole.

Whatever strikes and when: the run completes, every sample is used once and in order, one generation at a time commits,
and the losses are those of the undisturbed run: bit for bit as long as the layout is the same, within the order of
float sums after that.

A handful of fixed sequences, about 60 s on two cores; for three dozen random ones, about 12 minutes:

    make test ARGS="tests/integration/test_run_random.py --hypothesis-profile=dozens"
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from product import MARK, STEPS, TINY, Report, assert_near, check_story, kill, marked

from elastictrain import ElasticTrainer, TrainConfig
from elastictrain.events import Event, GenerationStarted, StepCommitted
from elastictrain.status import Status
from elastictrain.tracking.journal import read_journal

DOZENS = settings.get_current_profile_name() == "dozens"
LONG = 4 * STEPS
"""Steps of a run in which a node joins: a node, a keeper and a worker take some 8 s to come up."""

by_plan = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["kill", "segfault", "exit", "exception", "preempt", "bitflip", "stop", "loop"]),
        "rank": st.integers(0, 1),
        "phase": st.sampled_from(["forward", "backward", "update", "snapshot"]),
    }
)
from_outside = st.fixed_dictionaries({"kind": st.sampled_from(["lose node", "join node"])})
sequences = st.lists(
    st.tuples(st.integers(5, STEPS - 20), st.one_of(by_plan, by_plan, from_outside)),
    min_size=1,
    max_size=4,
    unique_by=lambda fault: fault[0],  # an exception that comes twice in one step is a bug, and ends the run
).map(lambda faults: [{"at": at, **what} for at, what in sorted(faults, key=lambda fault: fault[0])])

Sequence = list[dict[str, Any]]


@dataclass
class Nodes:
    """A head node, where the driver is, and others that come and go; room for one worker each."""

    cluster: Any
    others: list[subprocess.Popen[bytes]] = field(default_factory=list)
    """`ray start --block`: Ray's own Cluster starts nodes in the main thread only, and waits for each."""
    seen_up: set[int] = field(default_factory=set)
    numbers: Iterator[int] = field(default_factory=lambda: count(42))

    def add(self) -> None:
        """Start one more, at an address that was never used."""
        ray = str(Path(sys.executable).with_name("ray"))
        command = [ray, "start", f"--address={self.cluster.address}", "--num-cpus=1", "--block"]
        command += [f"--node-ip-address=127.0.0.{next(self.numbers)}", f"--object-store-memory={100 * 2**20}"]
        self.others.append(
            subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        )

    def lose(self) -> None:
        """SIGKILL to the oldest and all that it started."""
        for node in self.others[:1]:
            assert node.stdout is not None
            node.stdout.close()
            if node.poll() is None:
                process = psutil.Process(node.pid)
                kill([process, *process.children(recursive=True)])
                node.wait()
        del self.others[:1]

    def settle(self) -> None:
        """One other node, as in the beginning."""
        while len(self.others) > 1:
            self.lose()
        for _ in range(3):
            if not self.others:
                self.add()
            if self._comes_up(self.others[0]):
                return
            self.lose()  # on a busy machine Ray gives up on its agent
        raise AssertionError("no node comes up")

    def _comes_up(self, node: subprocess.Popen[bytes]) -> bool:
        assert node.stdout is not None
        while node.pid not in self.seen_up:
            line = node.stdout.readline()
            if not line:
                return False
            if b"runtime started" in line:
                self.seen_up.add(node.pid)
        return True


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """Two Ray nodes for all of the runs."""
    from ray.cluster_utils import Cluster

    folder = Path(tempfile.mkdtemp(prefix="et-"))
    (folder / "ray").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}.items():
            patch.setenv(name, value)
        patch.setenv(MARK, str(folder))
        head = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "node_ip_address": "127.0.0.41"}
        head |= {"temp_dir": str(folder / "ray"), "include_dashboard": False}
        nodes = Nodes(Cluster(initialize_head=True, head_node_args=head))
        try:
            yield nodes
        finally:
            nodes.cluster.shutdown()
            while nodes.others:
                nodes.lose()
            kill(marked(str(folder)))
            shutil.rmtree(folder, ignore_errors=True)


class Strikes:
    """Hears the run, and has nodes go and come when their step is committed."""

    def __init__(self, nodes: Nodes, faults: Sequence) -> None:
        self._due = [fault for fault in faults if fault["kind"] in ("lose node", "join node")]
        self._nodes = nodes

    def on_event(self, event: Event) -> None:
        while isinstance(event, StepCommitted) and self._due and event.step >= self._due[0]["at"]:
            getattr(self._nodes, {"lose node": "lose", "join node": "add"}[self._due.pop(0)["kind"]])()

    def on_status(self, status: Status) -> None:
        pass

    def close(self) -> None:
        pass


def assert_one_writer(events: list[Event]) -> None:
    """Each step is committed by the generation that was formed last, and none by one before it."""
    current, steps = -1, 0
    for event in events:
        if isinstance(event, GenerationStarted):
            assert event.index > current
            current, steps = event.index, event.first_step - 1
        elif isinstance(event, StepCommitted):
            assert event.generation == current
            assert event.step == steps + 1
            steps = event.step


def assert_same_bits_at_first(report: Report, undisturbed: Report) -> None:
    """Bit for bit the undisturbed losses until a generation has another layout than those had."""
    layout = undisturbed["generations"][0]["layout"]
    changed = (
        g["first_step"] for g in report["generations"] if g["continuation"] != "bit_exact" or g["layout"] != layout
    )
    same = min(next(changed, LONG + 1) - 1, STEPS)
    assert report["loss"][:same] == undisturbed["loss"][:same]


handful = settings(max_examples=2, derandomize=True)
nine = settings(max_examples=9, print_blob=True)
numbers = count()


@pytest.mark.parametrize("part", range(4 if DOZENS else 1))
@settings(
    nine if DOZENS else handful,
    deadline=None,
    database=None,
    phases=(Phase.generate,),  # to shrink would take an hour
    suppress_health_check=list(HealthCheck),
)
@given(faults=sequences)
def test_random_faults_leave_no_trace(
    part: int, nodes: Nodes, storage_folder: Path, undisturbed: Report, faults: Sequence
) -> None:
    note(f"part {part}: {faults}")
    joins = any(fault["kind"] == "join node" for fault in faults)
    planned = [fault for fault in faults if fault["kind"] not in ("lose node", "join node")]
    config = TrainConfig.from_dict(
        TINY
        | {
            "run": {"name": f"random-{next(numbers)}", "storage": str(storage_folder / "storage")},
            "train": TINY["train"] | {"steps": LONG if joins and DOZENS else STEPS},
            "elastic": {"min_workers": 1, "max_workers": 2, "standby": 1, "hang_patience_s": 1.5},
            "cluster": {"address": str(nodes.cluster.address)},
            "faults": planned,
        }
    )
    nodes.settle()
    result = ElasticTrainer(config, progress=Strikes(nodes, faults)).fit()
    report = result.report_data
    check_story(report)
    assert (report["status"], report["steps"]) == ("complete", config.train.steps)
    assert {g["source"] for g in report["generations"][1:]} <= {"memory", "durable", "fresh"}
    assert_near(report, undisturbed)
    assert_same_bits_at_first(report, undisturbed)
    assert_one_writer(read_journal(storage_folder / "storage" / config.run.name))
    with suppress(FileNotFoundError):
        shutil.rmtree(storage_folder / "storage" / config.run.name / "checkpoints")
