"""Preparation on a real Ray: made once, found again, resumed after a kill, mended after damage. About 20 s."""

import fcntl
import logging
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from elastictrain.config import TrainConfig
from elastictrain.data.corpus import find_documents
from elastictrain.data.manifest import Manifest
from elastictrain.data.prepare import Prepared, prepare
from elastictrain.data.shards import TokenShards
from elastictrain.data.spans import read
from elastictrain.errors import DataError, InfrastructureError

STDLIB = Path(sysconfig.get_paths()["stdlib"])


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[str]:
    folder = tempfile.mkdtemp(prefix="et-")  # short: Ray's socket paths have a limit
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        context = ray.init(
            address="local", num_cpus=2, include_dashboard=False, _temp_dir=folder, logging_level=logging.ERROR
        )
        yield str(context.address_info["address"])
        ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def config(corpus: Path | str = STDLIB / "email", **data: object) -> TrainConfig:
    fields = {"corpus": str(corpus), "vocab_size": 512, "seq_len": 32, "num_shards": 4, "validation_fraction": 0.1}
    return TrainConfig.from_dict({"data": fields | data})


@pytest.fixture(scope="module")
def prepared(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(config(), tmp_path_factory.mktemp("data"))


@pytest.fixture
def home(prepared: Prepared, tmp_path: Path) -> Path:
    """A copy of the prepared folder, to be harmed."""
    home = tmp_path / prepared.manifest.folder.name
    shutil.copytree(prepared.manifest.folder, home)
    return home


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_text_becomes_samples(prepared: Prepared) -> None:
    manifest = Manifest.load(prepared.manifest.folder)
    assert manifest == prepared.manifest
    assert not prepared.reused
    assert prepared.num_made == len(manifest.train) + len(manifest.validation) == 5
    shards = TokenShards(manifest)
    text = manifest.tokenizer().decode(shards.read(range(len(shards)))[:, 1:].flatten().tolist())
    parts = [read(span).decode() for span in find_documents(config().data).train if span.num_bytes < 20_000]
    assert parts
    assert sum(part[: part.rindex("\n")] in text for part in parts) >= len(parts) - 5  # a shard's last tokens are cut
    assert manifest.num_documents == len(
        [p for p in (STDLIB / "email").rglob("*") if p.suffix in (".py", ".rst") and p.stat().st_size]
    )


def test_it_is_found_again(prepared: Prepared) -> None:
    before = {path: path.stat().st_mtime_ns for path in prepared.manifest.folder.glob("*.arrow")}
    again = prepare(config(), prepared.manifest.folder.parent)
    assert again.reused
    assert again.manifest == prepared.manifest
    assert {path: path.stat().st_mtime_ns for path in before} == before
    evaluated = prepare(config(validation_samples=7), prepared.manifest.folder.parent)
    assert evaluated.reused


def test_another_config_gets_its_own_folder(prepared: Prepared, home: Path) -> None:
    other = prepare(config(seq_len=64), home.parent)
    assert other.manifest.folder != home
    assert other.manifest.num_samples < prepared.manifest.num_samples
    assert contents(home) == contents(prepared.manifest.folder)


def test_fewer_cpus_give_the_same_bytes(prepared: Prepared, tmp_path: Path) -> None:
    @ray.remote(num_cpus=1)
    class Busy:
        def ready(self) -> bool:
            return True

    busy = Busy.remote()
    assert ray.get(busy.ready.remote())
    assert ray.available_resources()["CPU"] == 1
    alone = prepare(config(), tmp_path)
    ray.kill(busy)
    assert contents(alone.manifest.folder) == contents(prepared.manifest.folder)


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove", "record", "tokenizer", "manifest"])
def test_only_what_is_damaged_is_made_anew(prepared: Prepared, home: Path, harm: str) -> None:
    shard = home / "train-00001.arrow"
    match harm:
        case "flip":
            damaged = bytearray(shard.read_bytes())
            damaged[len(damaged) // 2] ^= 1
            shard.write_bytes(damaged)
        case "truncate":
            os.truncate(shard, shard.stat().st_size // 2)
        case "remove":
            shard.unlink()
        case "record":
            shard.with_suffix(".json").write_text("{")
        case "tokenizer":
            text = (home / "tokenizer.json").read_text()
            (home / "tokenizer.json").write_text(text.replace("self", "fles", 1))
        case "manifest":
            (home / "manifest.json").write_text("{")
    others = {path: path.stat().st_mtime_ns for path in home.glob("*.arrow") if path != shard}
    mended = prepare(config(), home.parent)
    assert mended.num_made == (0 if harm in ("tokenizer", "manifest") else 1)
    assert {path: path.stat().st_mtime_ns for path in others} == others
    assert contents(home) == contents(prepared.manifest.folder)
    assert mended.manifest.sha256() == prepared.manifest.sha256()


def test_a_killed_preparation_goes_on(cluster: str, tmp_path: Path) -> None:
    """A driver is killed when its first shard is there; the next one keeps that shard and ends with the same bytes."""
    big = config(STDLIB / "*.py", num_shards=12)
    program = (
        "import sys, json, ray; from pathlib import Path; from elastictrain.config import TrainConfig; "
        "from elastictrain.data.prepare import prepare; ray.init(address=sys.argv[1], logging_level=40); "
        "prepare(TrainConfig.from_dict(json.loads(sys.argv[2])), Path(sys.argv[3]))"
    )
    driver = subprocess.Popen(
        [sys.executable, "-c", program, cluster, big.model_dump_json(), str(tmp_path / "killed")],
        stdout=subprocess.DEVNULL,
    )
    try:
        while not list((tmp_path / "killed").glob("*/train-*.json")):
            assert driver.poll() is None, "the preparation ended before it could be killed"
            time.sleep(0.005)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    (home,) = (tmp_path / "killed").iterdir()
    (home / ".train-00011.arrow.0123.tmp").write_bytes(b"unfinished")
    done = {path.with_suffix(".arrow") for path in home.glob("*-*.json")}
    before = {path: path.stat().st_mtime_ns for path in done}

    resumed = prepare(big, tmp_path / "killed")
    assert resumed.num_made <= 13 - len(done)
    assert {path: path.stat().st_mtime_ns for path in done} == before
    assert contents(resumed.manifest.folder) == contents(prepare(big, tmp_path / "whole").manifest.folder)


def test_a_second_preparation_waits_for_the_first(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    told = threading.Event()
    results: list[Prepared] = []
    logger = logging.getLogger("elastictrain.data.prepare")
    handler = logging.Handler()
    handler.emit = lambda record: told.set()  # type: ignore[method-assign]  # logging's own way to be heard
    logger.addHandler(handler)
    second = threading.Thread(target=lambda: results.append(prepare(config(), home.parent)))
    with (home / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second.start()
        assert told.wait(30)
        assert not results
    second.join(30)
    logger.removeHandler(handler)
    assert "another process prepares the data" in caplog.text
    assert results[0].reused


def test_a_wrong_corpus_is_told_before_anything_is_made(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    for corpus, message in (("missing.txt", "is not there"), ("empty.txt", "holds no text")):
        with pytest.raises(DataError, match=message):
            prepare(config(tmp_path / corpus), tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_text_of_too_few_tokens_is_told(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("the same words again\n" * 100)
    with pytest.raises(DataError, match=r"too little text: \d+ tokens for validation.*raise data\.validation_fraction"):
        prepare(config(tmp_path / "book.txt", validation_fraction=0.03), tmp_path / "data")


def test_a_document_that_tasks_cannot_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text goes away between the driver's look and the task's."""
    source = tmp_path / "book.txt"
    source.write_bytes((STDLIB / "argparse.py").read_bytes())

    def gone(spans: object) -> list[str]:
        source.unlink()
        return ["some text"]

    monkeypatch.setattr("elastictrain.data.prepare.tokenizer_text", gone)
    with pytest.raises(DataError, match=r"^can't read .*book\.txt: No such file.*data\.corpus"):
        prepare(config(source), tmp_path / "data")


def test_a_folder_that_is_none_names_the_knob(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InfrastructureError, match=r"can't write to .*Not a directory.*run\.storage"):
        prepare(config(), tmp_path / "file")
