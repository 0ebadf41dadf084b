"""The wheel has all that it needs, and works from an empty folder, far from the repository. About 5 s.

It is built offline with the setuptools of this environment, and installed without its dependencies, which are here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from elastictrain import __version__

ROOT = Path(__file__).parents[1]
PIP = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", "--no-input"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: the build leaves things beside its sources."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "elastictrain", source / "elastictrain", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder), str(source)]
    subprocess.run([*PIP, *build], check=True, cwd=folder, stdin=subprocess.DEVNULL)
    (built,) = folder.glob("*.whl")
    return built


def test_it_holds_the_package_and_nothing_else(wheel: Path) -> None:
    assert wheel.name == f"elastictrain-{__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    code = {name for name in names if not name.startswith(f"elastictrain-{__version__}.dist-info/")}
    here = (path for path in (ROOT / "elastictrain").rglob("*") if path.is_file() and path.suffix != ".pyc")
    assert code == {str(path.relative_to(ROOT)) for path in here}
    assert {"elastictrain/py.typed", "elastictrain/cli/llm_tiny.yaml", "elastictrain/tracking/report.html"} <= code


def test_it_works_from_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    place, work = tmp_path / "installed", tmp_path / "empty"
    work.mkdir()
    subprocess.run([*PIP, "install", "--no-deps", "--no-index", "--target", str(place), str(wheel)], check=True)

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, str(place / "bin" / "elastictrain"), *arguments],
            cwd=work, env=os.environ | {"PYTHONPATH": str(place)}, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("--version") == f"{__version__}\n"
    assert run("init") == "elastictrain train llm_tiny.yaml\n"
    assert "steps: 7\n" in run("train", "llm_tiny.yaml", "train.steps=7", "faults=[]", "--dry-run")
    assert [path.name for path in work.iterdir()] == ["llm_tiny.yaml"]
