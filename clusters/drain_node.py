"""Tells Ray that this machine is about to go, so that its workers leave at a step boundary and no step is lost.

    drain_node.py now --seconds 20    at once: a Kubernetes preStop hook; then waits until Ray's node has ended
    drain_node.py aws                 when the metadata service announces that this spot instance is interrupted
    drain_node.py gcp                 when it announces that this spot VM is preempted

Without it a spot machine just vanishes: the cloud tells the machine, and Ray does not ask. The step in flight is then
done again; with it, none is. It costs one small HTTP request a second, and needs Python's standard library and the
`ray` command. The Ray nodes are found by their raylets: all of this machine's, or those of one `--cluster`. RAY_ADDRESS
does not choose them, since it may name the head otherwise than Ray does.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

POLL_S = 1.0
MARGIN_S = 5
"""Before the machine's own deadline: what is not out by then is killed by Ray, not by the cloud."""
GCP_NOTICE_S = 30
METADATA = {"aws": "http://169.254.169.254", "gcp": "http://metadata.google.internal"}


@dataclass(frozen=True)
class Raylet:
    pid: int
    node_id: str
    gcs_address: str


def main() -> None:
    parser = argparse.ArgumentParser(description="Drain this machine's Ray nodes, now or when the cloud takes it.")
    parser.add_argument("when", choices=["now", "aws", "gcp"])
    parser.add_argument("--seconds", type=int, default=25, help="with `now`: until the machine goes (25)")
    parser.add_argument("--metadata", metavar="URL", help="of the metadata service, where it is another")
    parser.add_argument("--cluster", metavar="HOST:PORT", help="only the nodes of this one, on a machine of many")
    arguments = parser.parse_args()
    if arguments.when == "now":
        seconds = arguments.seconds
    else:
        notice = {"aws": aws_notice, "gcp": gcp_notice}[arguments.when]
        seconds = wait_for(notice, (arguments.metadata or METADATA[arguments.when]).rstrip("/"))
    found = raylets(arguments.cluster)
    if not found:
        where = f" that belongs to {arguments.cluster} (--cluster)" if arguments.cluster else ""
        sys.exit(f"no Ray node runs on this machine{where}: nothing to drain")
    failed = [raylet.node_id for raylet in found if not drain(raylet, seconds)]
    if arguments.when == "now":
        wait_until_gone(found, seconds)
    if failed:
        sys.exit(f"not drained: {', '.join(failed)}. They count as lost nodes when they go.")


def wait_for(notice: Callable[[str], int | None], base: str) -> int:
    """The seconds that are left, once the cloud has told; a metadata service that fails is asked again."""
    while True:
        try:
            seconds = notice(base)
        except OSError as error:  # URLError too
            print(f"{base}: {error}; asking again", file=sys.stderr, flush=True)
            seconds = None
        if seconds is not None:
            return seconds
        time.sleep(POLL_S)


def aws_notice(base: str) -> int | None:
    """Seconds until the instance is stopped, less a margin; None before the two-minute notice (IMDSv2 only)."""
    headers = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    token = fetch(urllib.request.Request(f"{base}/latest/api/token", method="PUT", headers=headers))
    action = urllib.request.Request(
        f"{base}/latest/meta-data/spot/instance-action", headers={"X-aws-ec2-metadata-token": token}
    )
    try:
        at = datetime.fromisoformat(json.loads(fetch(action))["time"])
    except urllib.error.HTTPError as error:
        if error.code == 404:  # nothing is announced
            return None
        raise
    return max(1, int((at - datetime.now(UTC)).total_seconds()) - MARGIN_S)


def gcp_notice(base: str) -> int | None:
    """Seconds until the VM is stopped, less a margin; None before the thirty-second notice."""
    url = f"{base}/computeMetadata/v1/instance/preempted"
    told = fetch(urllib.request.Request(url, headers={"Metadata-Flavor": "Google"}))
    return GCP_NOTICE_S - MARGIN_S if told == "TRUE" else None


def fetch(request: urllib.request.Request) -> str:
    with urllib.request.urlopen(request, timeout=5) as response:
        return str(response.read(4096).decode().strip())


def raylets(address: str | None) -> list[Raylet]:
    """The Ray nodes of this machine, of one cluster if an address is given."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_text(errors="replace").split("\0")
        except OSError:  # it ended, or is another user's
            continue
        flags = dict(word[2:].split("=", 1) for word in words[1:] if word.startswith("--") and "=" in word)
        if Path(words[0]).name == "raylet" and "node_id" in flags and "gcs-address" in flags:
            found.append(Raylet(int(folder.name), flags["node_id"], flags["gcs-address"]))
    return [raylet for raylet in found if address in (None, raylet.gcs_address)]


def drain(raylet: Raylet, seconds: int) -> bool:
    command = ["ray", "drain-node", "--address", raylet.gcs_address, "--node-id", raylet.node_id]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "the machine is taken away"]
    command += ["--deadline-remaining-seconds", str(seconds)]
    accepted = subprocess.run(command, check=False).returncode == 0
    print(f"Ray node {raylet.node_id}: {'leaves' if accepted else 'not drained'} within {seconds} s", flush=True)
    return accepted


def wait_until_gone(found: list[Raylet], seconds: int) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(Path(f"/proc/{raylet.pid}").exists() for raylet in found):
        time.sleep(0.2)


if __name__ == "__main__":
    main()
