"""Folders of embedded clusters that were killed with everything else are removed by the next one that starts."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from elastictrain.runtime.local_cluster import own, sweep

OWNER = """
import sys
from pathlib import Path
from elastictrain.runtime.local_cluster import own
own(Path(sys.argv[1]))
print("owned", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def passing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_only_folders_whose_owner_is_gone_are_removed(passing: Path) -> None:
    folders = {name: passing / f"et-{name}" for name in ("lives", "died", "mine", "nobodys")}
    for folder in folders.values():
        (folder / "ray").mkdir(parents=True)
    own(folders["mine"])
    owners = {
        name: subprocess.Popen(
            [sys.executable, "-c", OWNER, str(folders[name])], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for name in ("lives", "died")
    }
    try:
        for owner in owners.values():
            assert owner.stdout is not None
            assert owner.stdout.readline() == b"owned\n"
        sweep()
        assert {folder.name for folder in passing.iterdir()} == {folder.name for folder in folders.values()}
        owners["died"].kill()
        owners["died"].wait()
        sweep()
        assert not folders["died"].exists()
        assert all(folders[name].is_dir() for name in ("lives", "mine", "nobodys"))
    finally:
        for owner in owners.values():
            owner.kill()
            owner.communicate()


def test_a_link_in_the_way_is_not_followed(passing: Path) -> None:
    (passing / "et-x").mkdir()
    (passing / "elsewhere").write_text("precious")
    os.symlink(passing / "elsewhere", passing / "et-x" / "owner.lock")
    sweep()
    assert (passing / "elsewhere").read_text() == "precious"
    assert (passing / "et-x").is_dir()
