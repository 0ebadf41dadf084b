"""Which Ray cluster a run is on: the one that it was submitted to, or an embedded one that lives and dies with it."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil
from subprocess import PIPE, Popen

import ray

from elastictrain.authentication import leave_own_token, take_own_token
from elastictrain.config import TrainConfig
from elastictrain.errors import InfrastructureError
from elastictrain.runtime import local_cluster
from elastictrain.runtime.probe import answers

_REACH_TIMEOUT_S = 5.0
_END_TIMEOUT_S = 120.0
"""An embedded cluster ends in 2 s; one that is just starting does so first."""


@contextmanager
def connected(config: TrainConfig) -> Iterator[str]:
    """Ray, initialised for this process, until the block ends; gives the address, or `embedded`.

    Raises InfrastructureError when the cluster can't be reached or the embedded one can't start.
    """
    check_reachable(config)
    address = _address(config)
    if address == "local":
        take_own_token()
        with _embedded(config) as inner:
            _init(inner)
            try:
                yield "embedded"
            finally:
                ray.shutdown()
        return
    leave_own_token()
    _init(address)
    try:
        yield address
    finally:
        ray.shutdown()


def check_reachable(config: TrainConfig) -> None:
    """Raises InfrastructureError where `connected` would for lack of a cluster, or of a port for an embedded one."""
    address = _address(config)
    if address != "local":
        _check_reachable(address)
    elif config.cluster.dashboard:
        _check_port(config.cluster.dashboard_port)


def _address(config: TrainConfig) -> str:
    if config.cluster.address != "auto":
        return config.cluster.address
    return os.environ.get("RAY_ADDRESS") or "local"


def head_address() -> tuple[str, int]:
    """Where the connected cluster's head listens, which holds Ray's own state."""
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    return host.strip("[]"), int(port)


def head_answers() -> bool:
    """Whether the cluster can be asked for anything. Without its head Ray blocks, and ends this process in a minute."""
    return answers(head_address())


def _init(address: str) -> None:
    try:
        # A namespace of its own, which is Ray's default: other runs on the cluster may have the same name.
        ray.init(address=address, logging_level="warning", log_to_driver=True)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InfrastructureError(
            f"no Ray cluster at {address!r} (cluster.address or RAY_ADDRESS): {error}. Start one with "
            f"`ray start --head`, or set cluster.address=local for an embedded one."
        ) from error


@contextmanager
def _embedded(config: TrainConfig) -> Iterator[str]:
    """A cluster of `cluster.local_nodes` Ray nodes on this machine; it ends with this process, however that ends."""
    nodes = config.cluster.local_nodes
    workers = config.elastic.max_workers + config.elastic.standby
    options = {
        "num_nodes": nodes,
        "num_cpus": ceil(workers / nodes) * max(1, ceil(config.elastic.cpus_per_worker)),
        "dashboard_port": config.cluster.dashboard_port if config.cluster.dashboard else None,
    }
    process = Popen(
        [sys.executable, "-m", local_cluster.__name__, json.dumps(options)],
        stdin=PIPE,
        stdout=PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        told = json.loads(process.stdout.readline() or '{"error": "its process ended"}')
        if "error" in told:
            raise InfrastructureError(f"the embedded Ray cluster did not start: {told['error']}")
        yield told["address"]
    finally:  # not Popen's own end: on Ctrl-C it would leave without waiting
        process.stdin.close()
        process.wait(_END_TIMEOUT_S)
        process.stdout.close()


def _check_reachable(address: str) -> None:
    """Ray itself tries for minutes."""
    if address.startswith(("http://", "https://")):
        raise InfrastructureError(
            f"{address} (cluster.address or RAY_ADDRESS) is where a dashboard is, to which jobs are submitted (ray job "
            "submit --address). A run joins a cluster at its head's own address, such as 10.0.0.1:6379."
        )
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
