"""One cluster of two nodes for most of the runs, since a cluster takes as long to start as a run.

After each test a look for what it left behind: processes, actors, passing files, named shared memory.
"""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from product import ACTORS, MARK, Product, Report, eventually_none, kill, marked


@dataclass(frozen=True)
class SharedCluster:
    """A cluster that outlives the runs; `mark` is in the environment of all its processes."""

    address: str
    mark: str
    metrics: tuple[str, ...]
    """Where Prometheus would scrape each node."""


@pytest.fixture(scope="session")
def shared_cluster() -> Iterator[SharedCluster]:
    """Two Ray nodes with room for two workers each. 5 to 10 s."""
    from ray.cluster_utils import Cluster

    folder, mark = Path(tempfile.mkdtemp(prefix="et-")), uuid.uuid4().hex  # short: Ray's socket paths have a limit
    (folder / "ray").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_TMPDIR", str(folder))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv(MARK, mark)
        node = {"num_cpus": 2, "object_store_memory": 100 * 2**20}
        head = {"node_ip_address": "127.0.0.21", "temp_dir": str(folder / "ray"), "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=node | head)
        cluster.add_node(**node, node_ip_address="127.0.0.22")
    try:
        nodes = cluster.list_all_nodes()
        metrics = tuple(f"http://{n.node_ip_address}:{n.metrics_export_port}/metrics" for n in nodes)
        yield SharedCluster(str(cluster.address), mark, metrics)
    finally:
        cluster.shutdown()
        kill(marked(mark))
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def small_cluster() -> Iterator[Any]:
    """Two Ray nodes with room for one worker each; a test may add more."""
    from ray.cluster_utils import Cluster

    folder = Path(tempfile.mkdtemp(prefix="et-"))
    (folder / "ray").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}.items():
            patch.setenv(name, value)
        patch.setenv(MARK, str(folder))
        node = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
        head = {"node_ip_address": "127.0.0.31", "temp_dir": str(folder / "ray"), "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=node | head)
        cluster.add_node(**node, node_ip_address="127.0.0.32")
        try:
            yield cluster
        finally:
            cluster.shutdown()
            kill(marked(str(folder)))
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def storage_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One storage for the runs of the shared cluster: they share the token shards and the MLflow store."""
    return tmp_path_factory.mktemp("product")


@pytest.fixture
def product(shared_cluster: SharedCluster, storage_folder: Path) -> Iterator[Product]:
    """The product on the shared cluster; afterwards none of its actors is left there."""
    product = Product(storage_folder, shared_cluster.address)
    try:
        yield product
        assert not eventually_none(product.living)
        assert not eventually_none(lambda: [p for p in marked(shared_cluster.mark) if p.name().startswith(ACTORS)])
        assert not named_shared_memory()
    finally:
        product.close()


@pytest.fixture
def alone(storage_folder: Path) -> Iterator[Product]:
    """The product with an embedded cluster for each run; afterwards not one of its processes is left."""
    passing = tempfile.mkdtemp(prefix="et-")
    product = Product(storage_folder, passing=passing)
    try:
        yield product
        assert not eventually_none(product.living)
        assert not named_shared_memory()
    finally:
        product.close()
        shutil.rmtree(passing, ignore_errors=True)


@pytest.fixture(scope="session")
def undisturbed(shared_cluster: SharedCluster, storage_folder: Path) -> Report:
    """The report of a run to which nothing happens."""
    product = Product(storage_folder, shared_cluster.address)
    try:
        ended = product.train("undisturbed")
        assert ended.code == 0, ended.err
        return product.report("undisturbed")
    finally:
        product.close()


def named_shared_memory() -> list[str]:
    """What DeepSpeed or this project would leave in /dev/shm; Ray's own files are Ray's."""
    return [p.name for p in Path("/dev/shm").iterdir() if "deepspeed" in p.name or "elastictrain" in p.name]


@pytest.fixture(scope="session")
def stopped(shared_cluster: SharedCluster, storage_folder: Path) -> Path:
    """A storage with one run, `stopped`, that was told to stop on its way. Tests copy it."""
    product = Product(storage_folder, shared_cluster.address)
    storage = storage_folder / "stopped"
    storage.mkdir()
    try:
        running = product.begin("stopped", storage=storage)
        running.until_step(20)
        ended = running.stop()
        assert ended.code == 130, ended.err
        return storage
    finally:
        product.close()


@pytest.fixture
def small_disk(disk: Callable[[str], Path]) -> Path:
    """A filesystem of 8 MiB."""
    return disk("8m")
