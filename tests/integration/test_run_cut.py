"""A run whose nodes lose sight of each other: the side with the supervisor goes on, the other one writes nothing.

The second node is in a network namespace of its own, behind a virtual cable that is pulled and put back. No connection
is broken by that: packets just do not arrive. Needs CAP_NET_ADMIN. About 35 s on two cores.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from product import MARK, Product, Report, assert_near, kill, marked

from elastictrain.events import GenerationStarted, StepCommitted

NETWORK = f"198.18.{os.getpid() % 256}"
"""In the one that is set aside for tests of devices; two with one address would take each other's packets."""
HERE, THERE = f"{NETWORK}.1", f"{NETWORK}.2"


@dataclass
class Cable:
    """Between this side and the namespace."""

    namespace: str
    link: str

    def lay(self) -> None:
        """Make the namespace, and the cable to it; skips where this user may not."""
        inside = f"{self.link}b"
        try:
            made = _ip("netns", "add", self.namespace)
        except FileNotFoundError:
            pytest.skip("there is no `ip` command (Debian: iproute2)")
        if made.returncode:
            pytest.skip(f"needs CAP_NET_ADMIN for a network namespace: {made.stderr.strip()}")
        for command in (
            ("link", "add", self.link, "type", "veth", "peer", "name", inside),
            ("link", "set", inside, "netns", self.namespace),
            ("addr", "add", f"{HERE}/24", "dev", self.link),
            ("link", "set", self.link, "up"),
            ("-n", self.namespace, "addr", "add", f"{THERE}/24", "dev", inside),
            ("-n", self.namespace, "link", "set", inside, "up"),
            ("-n", self.namespace, "link", "set", "lo", "up"),
        ):
            done = _ip(*command)
            if done.returncode:
                pytest.skip(f"needs CAP_NET_ADMIN for `ip {' '.join(command)}`: {done.stderr.strip()}")

    def processes(self) -> list[psutil.Process]:
        """Those in the namespace."""
        return [psutil.Process(int(pid)) for pid in _ip("netns", "pids", self.namespace).stdout.split()]

    def pull(self) -> None:
        """Nothing passes from now on."""
        assert _ip("link", "set", self.link, "down").returncode == 0

    def put_back(self) -> None:
        """All passes again."""
        assert _ip("link", "set", self.link, "up").returncode == 0

    def remove(self) -> None:
        """Also when only a part is there."""
        _ip("link", "del", self.link)
        _ip("netns", "del", self.namespace)


def _ip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], check=False, capture_output=True, text=True)


def remove_left_over() -> None:
    """Cables of tests that were killed."""
    with suppress(FileNotFoundError):
        for line in _ip("netns", "list").stdout.splitlines():
            namespace = line.split()[0]
            prefix, _, pid = namespace.partition("-")
            if prefix == "et" and pid.isdigit() and not psutil.pid_exists(int(pid)):
                Cable(namespace, f"et{pid}").remove()


@pytest.fixture
def cable() -> Iterator[Cable]:
    """Laid; removed afterwards."""
    remove_left_over()
    cable = Cable(f"et-{os.getpid()}", f"et{os.getpid()}")
    try:
        cable.lay()
        yield cable
    finally:
        cable.remove()


@pytest.fixture
def two_sides(cable: Cable) -> Iterator[str]:
    """A head node on this side and a node behind the cable, with room for one worker each; the cluster's address."""
    import ray
    from ray.cluster_utils import Cluster

    folder = Path(tempfile.mkdtemp(prefix="et-"))
    (folder / "ray").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}.items():
            patch.setenv(name, value)
        patch.setenv(MARK, str(folder))
        node = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
        head = {"node_ip_address": HERE, "temp_dir": str(folder / "ray"), "include_dashboard": False}
        cluster: Any = Cluster(initialize_head=True, head_node_args=node | head)
        command = [
            str(Path(sys.executable).with_name("ray")),
            "start",
            f"--address={cluster.address}",
            f"--node-ip-address={THERE}",
            "--num-cpus=1",
            "--block",
        ]
        said = folder / "behind.txt"
        with said.open("w") as file:
            behind = subprocess.Popen(
                ["ip", "netns", "exec", cable.namespace, *command, f"--object-store-memory={100 * 2**20}"],
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            ray.init(cluster.address, logging_level="error")
            until = time.monotonic() + 60
            while not any(node["NodeManagerAddress"] == THERE and node["Alive"] for node in ray.nodes()):
                assert behind.poll() is None, said.read_text()
                assert time.monotonic() < until, said.read_text()
                time.sleep(0.2)
            ray.shutdown()
            yield str(cluster.address)
        finally:
            ray.shutdown()
            cluster.shutdown()
            kill(marked(str(folder)))
            behind.wait()
            shutil.rmtree(folder, ignore_errors=True)


def written_by(process: psutil.Process, folder: Path) -> list[str]:
    """Files under this folder that the process has open for writing."""
    with suppress(psutil.NoSuchProcess):
        return [f.path for f in process.open_files() if f.mode != "r" and Path(f.path).is_relative_to(folder)]
    return []


def test_two_nodes_lose_sight_of_each_other(
    cable: Cable, two_sides: str, storage_folder: Path, undisturbed: Report
) -> None:
    product = Product(storage_folder, two_sides)
    try:
        running = product.begin("cut", "elastic.min_workers=1", "train.steps=100000", "checkpoint.every=20")
        status = running.until(
            "both nodes", lambda: (s := running.status()) and s.world_size == 2 and s.step >= 30 and s
        )
        [beyond] = [worker for worker in status.workers if worker.node == THERE]
        [keeper] = [process for process in cable.processes() if process.name().startswith("ray::Keeper")]
        cable.pull()
        alone = running.until_running(generation=1)
        assert [worker.node for worker in alone.workers] == [HERE]
        running.until_step(alone.step + 100)
        lost = [psutil.Process(beyond.pid), keeper]  # they live, and do not know
        assert all(not written_by(process, product.storage) for process in lost)
        cable.put_back()
        running.until("the end of who was cut off", lambda: not psutil.pid_exists(beyond.pid))
        running.until_step(running.status().step + 50)  # type: ignore[union-attr]  # it has begun
        ended = running.stop()
        assert ended.code == 130, ended.err
        report = product.report("cut")
        code, checkpoints = product.checkpoints("cut", "--verify")
    finally:
        product.close()
    assert_near(report, undisturbed)
    failure, *others = report["failures"]
    assert others == []
    assert (failure["kind"], failure["node"], failure["source"]) == ("node_lost", THERE, "memory")
    assert failure["lost_steps"] <= 1
    assert failure["detected_s"] < 10
    assert (code, {c["verified"] for c in checkpoints}) == (0, {True})
    [first, second] = [e.at for e in running.told(GenerationStarted)][:2]
    assert first < second
    assert all(e.generation >= 1 for e in running.told(StepCommitted) if e.at > second)
