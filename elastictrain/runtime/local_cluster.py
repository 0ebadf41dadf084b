"""An embedded Ray cluster as a process of its own: `python -m elastictrain.runtime.local_cluster OPTIONS`.

It has a session of its own, so that what a terminal or a job manager sends to the driver's process group (Ctrl-C,
`timeout`, `kill -TERM -pgid`) leaves the cluster up while the driver saves the last state. It prints its address as a
line of JSON, and ends when its standard input does: when the driver closes it, or dies, however it dies.

Its folder in the temporary directory goes with it. One that was killed together with everything else leaves its folder
behind; the next that starts removes it. Whose process lives shows in a lock, which ends with the process.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

OBJECT_STORE_BYTES = 200 * 2**20
"""Of each node: preparing the token shards is its only user."""

_PREFIX = "et-"
"""Short: Ray puts sockets there, whose paths may have 107 bytes."""
_LOCK = "owner.lock"


def own(folder: Path) -> None:
    """Hold the folder for as long as this process lives."""
    new = folder / f"{_LOCK}.new"
    descriptor = os.open(new, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    new.rename(folder / _LOCK)  # by this name it was never free


def sweep() -> None:
    """Remove the folders of this user's clusters whose process is gone."""
    for lock in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/{_LOCK}"):
        try:
            descriptor = os.open(lock, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:  # another's, or gone meanwhile
            continue
        try:
            if os.fstat(descriptor).st_uid == os.getuid():
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent, ignore_errors=True)
        except BlockingIOError:
            pass  # it lives
        finally:
            os.close(descriptor)


def main() -> None:
    """Serve until standard input ends."""
    options = json.loads(sys.argv[1])
    sweep()
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    own(folder)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing but the address on standard output
    cluster: Any = None
    try:
        try:
            cluster = _start(folder, **options)
            print(json.dumps({"address": cluster.address}), file=out, flush=True)
        except Exception as error:  # noqa: BLE001 - whatever it is, the driver tells it
            print(json.dumps({"error": _reason(error, folder)}), file=out, flush=True)
        sys.stdin.read()
    finally:
        if cluster is not None:
            cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def _start(folder: Path, num_nodes: int, num_cpus: int, dashboard_port: int | None) -> Any:
    os.environ["RAY_TMPDIR"] = str(folder)
    (folder / "ray").mkdir()
    from ray.cluster_utils import Cluster

    # Each node's agent also listens on 127.0.0.1: on Ray's own port it would keep `ray job submit` from another cluster
    common = {
        "num_cpus": num_cpus,
        "object_store_memory": OBJECT_STORE_BYTES,
        "dashboard_agent_listen_port": 0,
    }
    head = {
        **common,
        "node_ip_address": "127.0.0.2",
        "temp_dir": str(folder / "ray"),
        "include_dashboard": dashboard_port is not None,
        "dashboard_host": "127.0.0.1",
        "dashboard_port": dashboard_port or 0,  # Ray would try its own, and complain where another has it
    }
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for number in range(1, num_nodes):
        cluster.add_node(**common, node_ip_address=f"127.0.0.{2 + number}")
    return cluster


def _reason(error: Exception, folder: Path) -> str:
    logs = sorted(folder.glob("ray/session_*/logs/*.err"))
    told = [text for log in logs if (text := log.read_text(errors="replace").strip())]
    return "\n".join([str(error).strip() or type(error).__name__, *(text[-500:] for text in told[:3])])


if __name__ == "__main__":
    main()
