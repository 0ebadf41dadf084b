"""drain_node.py against a metadata service and raylets that are none, and the real `ray drain-node`'s options."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from files import CLUSTERS

ADDRESS = "203.0.113.1:6379"
"""Of documentation: no raylet of a real cluster has it."""
NODE = "ab" * 28


@contextmanager
def metadata(answers: dict[str, list[str | int]], asked: list[str]) -> Iterator[str]:
    """Answers each path's replies in turn, the last again and again; a number is an HTTP error."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(f"{self.command} {self.path}")
            left = answers[self.path]
            reply = left.pop(0) if len(left) > 1 else left[0]
            headed = {"X-aws-ec2-metadata-token": "secret"}, {"Metadata-Flavor": "Google"}
            allowed = self.command == "PUT" or any(self.headers.get(k) == v for h in headed for k, v in h.items())
            code = reply if isinstance(reply, int) else 200 if allowed else 401
            body = b"" if isinstance(reply, int) else reply.encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_PUT = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def fake_ray(tmp_path: Path) -> Path:
    """A `ray` that writes down what it was told, and ends $RAYLET if there is one."""
    command = tmp_path / "bin/ray"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >> {tmp_path}/told\n[ -z "$RAYLET" ] || kill "$RAYLET"\n')
    command.chmod(0o755)
    return tmp_path / "told"


@pytest.fixture
def raylet() -> Iterator[subprocess.Popen[bytes]]:
    script = "print(flush=True); import sys; sys.stdin.read()"
    flags = [f"--node_id={NODE}", f"--gcs-address={ADDRESS}", "--static_resource_list=node:1,1.0"]
    with subprocess.Popen(
        ["/ray/core/raylet", "-c", script, *flags], executable=sys.executable,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def run(fake_ray: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-S", str(CLUSTERS / "drain_node.py"), *arguments, "--cluster", ADDRESS],
        env={"PATH": f"{fake_ray.parent}/bin:/usr/bin:/bin", **environment},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def seconds_told(fake_ray: Path) -> int:
    words = fake_ray.read_text().split("\n")
    assert words[0] == "drain-node"
    told = dict(zip(words[1:-1:2], words[2:-1:2]))
    assert told["--node-id"] == NODE
    assert told["--address"] == ADDRESS
    assert told["--reason"] == "DRAIN_NODE_REASON_PREEMPTION"
    return int(told["--deadline-remaining-seconds"])


def test_ray_has_these_options(fake_ray: Path, raylet: subprocess.Popen[bytes]) -> None:
    assert run(fake_ray, "now", "--seconds", "1").returncode == 0
    from ray.scripts.scripts import cli

    words = fake_ray.read_text().splitlines()
    with cli.commands[words[0]].make_context("drain-node", words[1:]) as context:
        assert context.params["node_id"] == NODE
        assert context.params["deadline_remaining_seconds"] == 1


def test_now_ends_with_the_raylet(fake_ray: Path, raylet: subprocess.Popen[bytes]) -> None:
    reaper = threading.Thread(target=raylet.wait)
    reaper.start()
    done = run(fake_ray, "now", "--seconds", "600", RAYLET=str(raylet.pid))
    reaper.join()
    assert done.returncode == 0, done.stderr


def test_a_spot_instance_of_aws(fake_ray: Path, raylet: subprocess.Popen[bytes]) -> None:
    at = (datetime.now(UTC) + timedelta(seconds=120)).strftime("%Y-%m-%dT%H:%M:%SZ")
    action = json.dumps({"action": "terminate", "time": at})
    paths = {
        "/latest/api/token": ["secret"],
        "/latest/meta-data/spot/instance-action": [404, 503, action],
    }
    asked: list[str] = []
    with metadata({k: list(v) for k, v in paths.items()}, asked) as url:
        done = run(fake_ray, "aws", "--metadata", url)
    assert done.returncode == 0, done.stderr
    assert "503" in done.stderr, "a service that fails is told of and asked again"
    assert asked[0] == "PUT /latest/api/token"
    assert 90 <= seconds_told(fake_ray) <= 115


def test_a_spot_machine_of_google(fake_ray: Path, raylet: subprocess.Popen[bytes]) -> None:
    with metadata({"/computeMetadata/v1/instance/preempted": ["FALSE", "TRUE"]}, []) as url:
        done = run(fake_ray, "gcp", "--metadata", url)
    assert done.returncode == 0, done.stderr
    assert seconds_told(fake_ray) == 25


def test_a_machine_without_ray(fake_ray: Path) -> None:
    done = run(fake_ray, "now")
    assert done.returncode == 1
    assert "no Ray node runs on this machine" in done.stderr
