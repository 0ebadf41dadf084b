"""Which Ray cluster a run is on: the one that it was submitted to, or an embedded one that lives and dies with it."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from elastictrain.config import TrainConfig
from elastictrain.errors import InfrastructureError

NAMESPACE = "elastictrain"
"""Ray namespace of all actors of this project."""

_REACH_TIMEOUT_S = 5.0

_OBJECT_STORE_BYTES = 200 * 2**20
"""Of each embedded node: the token shards' preparation is its only user."""


@contextmanager
def connected(config: TrainConfig) -> Iterator[str]:
    """Ray, initialised for this process, until the block ends; gives the address, or `embedded`.

    Raises InfrastructureError when the cluster can't be reached or the embedded one can't start.
    """
    address = config.cluster.address
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or "local"
    if address == "local":
        with _embedded(config) as inner:
            _init(inner)
            try:
                yield "embedded"
            finally:
                ray.shutdown()
        return
    _init(address)
    try:
        yield address
    finally:
        ray.shutdown()


def _init(address: str) -> None:
    _check_reachable(address)
    try:
        ray.init(address=address, namespace=NAMESPACE, logging_level="warning", log_to_driver=True)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InfrastructureError(
            f"no Ray cluster at {address!r} (cluster.address or RAY_ADDRESS): {error}. Start one with "
            f"`ray start --head`, or set cluster.address=local for an embedded one."
        ) from error


@contextmanager
def _embedded(config: TrainConfig) -> Iterator[str]:
    """A cluster of `cluster.local_nodes` Ray nodes on this machine; they end with this process, however it ends."""
    from ray.cluster_utils import Cluster

    nodes = config.cluster.local_nodes
    if config.cluster.dashboard:
        _check_port(config.cluster.dashboard_port)
    workers = config.elastic.max_workers + config.elastic.standby
    cpus = max(1, -(-workers // nodes)) * max(1, round(config.elastic.cpus_per_worker))
    common = {"num_cpus": cpus, "object_store_memory": _OBJECT_STORE_BYTES}
    folder = Path(tempfile.mkdtemp(prefix="et-"))
    os.environ["RAY_TMPDIR"] = str(folder)
    (folder / "ray").mkdir()
    cluster: Any = None
    try:
        cluster = Cluster(
            initialize_head=True,
            head_node_args={
                **common,
                "node_ip_address": "127.0.0.2",
                "temp_dir": str(folder / "ray"),
                "include_dashboard": config.cluster.dashboard,
                "dashboard_host": "127.0.0.1",
                "dashboard_port": config.cluster.dashboard_port,
            },
        )
        for number in range(1, nodes):
            cluster.add_node(**common, node_ip_address=f"127.0.0.{2 + number}")
    except Exception as error:
        if cluster is not None:
            cluster.shutdown()
        raise InfrastructureError(f"the embedded Ray cluster did not start: {error}. Its logs: {folder}/ray") from error
    try:
        yield str(cluster.address)
    finally:
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def _check_reachable(address: str) -> None:
    """Ray itself tries for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_TIMEOUT_S).close()
    except OSError as error:
        raise InfrastructureError(
            f"no Ray cluster at {address} (cluster.address or RAY_ADDRESS): {error}. Start one with `ray start "
            f"--head`, or set cluster.address=local for an embedded one."
        ) from error


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise InfrastructureError(
                f"port {port} for the Ray dashboard (cluster.dashboard_port) is in use: {error.strerror}. Choose "
                f"another port, or set cluster.dashboard=false."
            ) from error
