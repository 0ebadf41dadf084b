"""What this machine has and lacks for training: one check per thing that has ever stopped a run.

`examine` returns findings and changes nothing. Packages are imported in processes of their own, side by side, so a
broken binary is a finding and no crash. Costs about five seconds, nearly all of it those imports.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from ctypes.util import find_library
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from elastictrain.machines import available_bytes
from elastictrain.tracking.wording import bytes_text

Verdict = Literal["ok", "warn", "fail"]
"""Good; works with a restriction; a run can't start."""

GB = 10**9
DASHBOARD_PORT = 8265
AGENT_PORT = 52365
IMPORT_TIMEOUT_S = 120

_TORCH = """
import torch
build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
print(torch.__version__, build, sep=", ", end="|")
print(*gpus, sep=", ")
"""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at."""

    check: str
    verdict: Verdict
    found: str
    advice: str = ""
    """What to do about it; empty where nothing is to be done."""


def examine(storage: str = "runs/") -> list[Finding]:
    """All findings about this machine, with `storage` as the place where runs would be kept."""
    with ThreadPoolExecutor() as pool:
        imports = [pool.submit(check) for check in (torch_and_gpus, deepspeed, ray)]
        machine = [kernel(), memory(), shared_memory(), disk(storage), dashboard_port(), agent_port(), free_port()]
        packages = [finding for done in imports for finding in done.result()]
    return [python(), *packages, *machine, compiler(), libaio()]


def python() -> Finding:
    """Python 3.11 or newer."""
    found = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info < (3, 11):  # noqa: UP036 - the package may have been put on another Python's path
        return Finding("python", "fail", found, "install Python 3.11 or newer and make the venv with it")
    return Finding("python", "ok", found)


def kernel() -> Finding:
    """Linux with memfd and pidfd: snapshots lie in the one, dead workers are noticed through the other."""
    found = f"{platform.system()} {platform.release()}"
    try:
        os.close(os.memfd_create("elastictrain-doctor"))
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError) as error:
        return Finding("kernel", "fail", f"{found}: {error}", "use Linux 5.3 or newer, outside a sandbox")
    return Finding("kernel", "ok", f"{found}, memfd and pidfd work")


def memory() -> Finding:
    """Memory that is free for workers (some 300 MB each) and Ray (about 1 GB)."""
    free = available_bytes()
    found = f"{bytes_text(free)} available"
    if free < 2 * GB:
        return Finding("memory", "fail", found, "free some: two workers and Ray need about 2 GB")
    if free < 4 * GB:
        return Finding("memory", "warn", found, "enough for a small run with elastic.max_workers 2 and standby 0")
    return Finding("memory", "ok", found)


def shared_memory(path: str = "/dev/shm") -> Finding:
    """Ray keeps its object store in /dev/shm; containers often get 64 MB."""
    try:
        usage = shutil.disk_usage(path)
    except OSError as error:
        return Finding("shared memory", "warn", f"{path}: {error.strerror}", "mount a tmpfs there; Ray uses disk now")
    found = f"{bytes_text(usage.free)} free of {bytes_text(usage.total)} in {path}"
    if usage.free < GB:
        return Finding("shared memory", "warn", found, "start the container with --shm-size=2g; Ray uses disk now")
    return Finding("shared memory", "ok", found)


def disk(storage: str) -> Finding:
    """Room and permission where runs are kept."""
    if "://" in storage and not storage.startswith("file://"):
        return Finding("disk", "ok", f"{storage} is remote: not looked at")
    folder = Path(storage.removeprefix("file://")).absolute()
    there = next(p for p in (folder, *folder.parents) if p.exists())
    if not there.is_dir():
        return Finding("disk", "fail", f"{there} is a file", "give run.storage a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        return Finding("disk", "fail", f"{there} is not writable", "give run.storage a folder that you may write to")
    free = shutil.disk_usage(there).free
    found = f"{bytes_text(free)} free at {there}"
    if free < GB // 2:
        return Finding("disk", "fail", found, "free some, or give run.storage a folder on another disk")
    if free < 5 * GB:
        return Finding("disk", "warn", found, "checkpoints take 12 bytes a parameter each; see checkpoint.keep_last")
    return Finding("disk", "ok", found)


def dashboard_port(port: int = DASHBOARD_PORT) -> Finding:
    """The Ray dashboard's port: taken where a cluster runs already."""
    advice = "if it is a Ray cluster, join it with cluster.address; else choose another cluster.dashboard_port"
    return _port("dashboard port", port, advice)


def agent_port(port: int = AGENT_PORT) -> Finding:
    """Where `ray start` has each node's agent listen, which starts what `ray job submit` submits."""
    advice = "a Ray node runs here, or start one with ray start --dashboard-agent-listen-port=PORT"
    return _port("agent port", port, advice)


def _port(check: str, port: int, advice: str) -> Finding:
    try:
        with socket.create_server(("127.0.0.1", port)):
            return Finding(check, "ok", f"{port} is free")
    except OSError as error:
        return Finding(check, "warn", f"{port}: {error.strerror}", advice)


def free_port() -> Finding:
    """Any port of localhost: ranks rendezvous through one."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            return Finding("rendezvous port", "ok", f"localhost gives free ports, such as {server.getsockname()[1]}")
    except OSError as error:
        return Finding("rendezvous port", "fail", str(error.strerror), "allow this user to listen on localhost")


def compiler() -> Finding:
    """g++ and ninja, with which DeepSpeed builds its optional operators."""
    missing = [] if shutil.which("g++") else ["g++"]
    if not shutil.which("ninja") and importlib.util.find_spec("ninja") is None:
        missing.append("ninja")
    if missing:
        advice = "install them (apt-get install g++; pip install ninja) for DeepSpeed's operators; no run needs them"
        return Finding("compiler", "warn", f"no {' and no '.join(missing)}", advice)
    return Finding("compiler", "ok", "g++ and ninja")


def libaio() -> Finding:
    """The library of DeepSpeed's asynchronous I/O, which `parallel.offload: nvme` does without."""
    library, header = find_library("aio"), Path("/usr/include/libaio.h").exists()
    if library and header:
        return Finding("libaio", "ok", f"{library} with its header")
    found = "the library without its header" if library else "not installed"
    return Finding("libaio", "warn", found, "apt-get install libaio-dev to have DeepSpeed's own I/O; no run needs it")


def torch_and_gpus() -> list[Finding]:
    """The torch build, and the GPUs that it sees."""
    version = _import("torch", _TORCH)
    if version.verdict != "ok":
        return [version]
    build, _, gpus = version.found.partition("|")
    torch = Finding("torch", "ok", build)
    if gpus:
        return [torch, Finding("gpus", "ok", gpus)]
    if shutil.which("nvidia-smi"):
        advice = "install a CUDA build of torch that suits the driver (nvidia-smi shows it)"
        return [torch, Finding("gpus", "warn", "there is a driver, but torch sees no GPU", advice)]
    return [torch, Finding("gpus", "ok", "none: ranks train on the CPU and talk through gloo")]


def deepspeed() -> list[Finding]:
    """DeepSpeed."""
    return [_import("deepspeed", "import deepspeed; print(deepspeed.__version__)")]


def ray() -> list[Finding]:
    """Ray."""
    return [_import("ray", "import ray; print(ray.__version__)")]


def worst(findings: Iterable[Finding]) -> Verdict:
    """The gravest verdict."""
    order: Callable[[Verdict], int] = ("ok", "warn", "fail").index
    return max((f.verdict for f in findings), key=order, default="ok")


def _import(package: str, code: str) -> Finding:
    advice = f"install it with pip install -c constraints.txt -e . and try python -c 'import {package}'"
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=IMPORT_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return Finding(package, "fail", f"its import takes more than {IMPORT_TIMEOUT_S} s", advice)
    if done.returncode:
        error = done.stderr.strip().splitlines()[-1:] or [f"its import ended with exit status {done.returncode}"]
        return Finding(package, "fail", error[0], advice)
    return Finding(package, "ok", done.stdout.strip().splitlines()[-1])
