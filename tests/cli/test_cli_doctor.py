"""`doctor` names what was found and what to do; it fails only for what stops a run. About five seconds of imports."""

import json
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

import elastictrain.doctor as doctor
from elastictrain.cli import app
from elastictrain.doctor import Finding

CHECKS = {
    "python", "torch", "gpus", "deepspeed", "ray", "kernel", "memory", "shared memory", "disk", "dashboard port",
    "agent port", "rendezvous port", "compiler", "libaio",
}  # fmt: skip


def test_this_machine_is_examined(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["doctor", "--json", "--storage", str(tmp_path)])
    findings = json.loads(result.stdout)
    assert {f["check"] for f in findings} == CHECKS
    assert result.exit_code == int(any(f["verdict"] == "fail" for f in findings))
    for finding in findings:
        assert finding["found"]
        assert (finding["verdict"] == "ok") == (finding["advice"] == "")


@pytest.mark.parametrize(("verdict", "status"), [("ok", 0), ("warn", 0), ("fail", 1)])
def test_only_a_failed_check_fails(monkeypatch: pytest.MonkeyPatch, verdict: doctor.Verdict, status: int) -> None:
    findings = [Finding("python", "ok", "3.11"), Finding("disk", verdict, "1 kB free", "free some")]
    monkeypatch.setattr(doctor, "examine", lambda storage: findings)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == status
    assert "1 kB free" in result.stdout
    assert "free some" in result.stdout


@pytest.mark.parametrize(
    ("look", "knob"),
    [(doctor.dashboard_port, "cluster.dashboard_port"), (doctor.agent_port, "--dashboard-agent-listen-port")],
)
def test_a_port_in_use_is_a_warning_with_the_knob(look: Callable[[int], Finding], knob: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        finding = look(port)
    assert finding.verdict == "warn"
    assert str(port) in finding.found
    assert knob in finding.advice


def test_a_storage_that_is_a_file_fails_with_the_knob(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    for storage in (tmp_path / "runs", tmp_path / "runs" / "below"):
        finding = doctor.disk(str(storage))
        assert (finding.verdict, str(tmp_path / "runs") in finding.found) == ("fail", True)
        assert "run.storage" in finding.advice


def test_a_storage_that_is_not_there_yet_is_judged_by_its_parent(tmp_path: Path) -> None:
    assert str(tmp_path) in doctor.disk(str(tmp_path / "a" / "b")).found
    assert not (tmp_path / "a").exists()


def test_a_remote_storage_is_left_alone() -> None:
    assert doctor.disk("s3://bucket/runs").verdict == "ok"


def test_missing_tools_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    finding = doctor.compiler()
    assert finding.verdict == "warn"
    assert "g++" in finding.found


def test_no_shared_memory_is_a_warning(tmp_path: Path) -> None:
    finding = doctor.shared_memory(str(tmp_path / "none"))
    assert finding.verdict == "warn"
    assert finding.advice


def test_a_package_that_does_not_import_is_a_failed_check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "ray.py").write_text("raise ImportError('libray.so: wrong ELF class')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (finding,) = doctor.ray()
    assert finding.verdict == "fail"
    assert "wrong ELF class" in finding.found
    assert "constraints.txt" in finding.advice


def test_a_package_that_crashes_is_a_failed_check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "ray.py").write_text("import os; os.abort()")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (finding,) = doctor.ray()
    assert finding.verdict == "fail"
