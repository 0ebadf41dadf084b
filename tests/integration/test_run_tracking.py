"""The MLflow record of whole runs, and what happens while the store or the disk can't take anything.

About 60 s on two cores.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from product import Product, Report, Running, assert_recorded, assert_same_training

from elastictrain.tracking.sqlite_store import default_uri


def test_a_dead_store_stops_nothing(product: Product, undisturbed: Report) -> None:
    """And the run, to which nothing else happens, is the undisturbed one over again, bit for bit.

    With fewer snapshots, of which none falls on a step whose checkpoint is due.
    """
    ended = product.train("untracked", "tracking.uri=http://127.0.0.1:1", "snapshot.every=7")
    assert ended.code == 0, ended.err
    problem = "MLflow at http://127.0.0.1:1 takes nothing: Connection refused (since "
    assert [line.count(problem) for line in ended.out.splitlines() if "127.0.0.1:1" in line] == [1, 0]
    assert ended.out.splitlines()[-1].endswith("http://127.0.0.1:1; the same command delivers the rest")
    report = product.report("untracked")
    assert_same_training(report, undisturbed)
    assert report["loss"] == undisturbed["loss"]
    assert report["failures"] == []
    assert {w["topic"] for w in report["warnings"]} == {"tracking"}
    assert [c["step"] for c in report["checkpoints"]] == [c["step"] for c in undisturbed["checkpoints"]]

    again = product.train("untracked")
    assert again.code == 0, again.err
    assert_recorded(product.storage, product.report("untracked"))


def test_mlflow_loads_the_registered_model_and_it_writes(product: Product, undisturbed: Report, tmp_path: Path) -> None:
    """In a process that knows MLflow alone; it writes what the run's evaluation wrote."""
    train, prompt = undisturbed["config"]["train"], undisturbed["config"]["train"]["sample_prompt"]
    asked = {"num_tokens": train["sample_tokens"], "seed": train["seed"]}
    code = (
        "import json, sys, mlflow\n"
        "mlflow.set_tracking_uri(sys.argv[1])\n"
        "model = mlflow.pyfunc.load_model(f'models:/{sys.argv[2]}@best')\n"
        "told = model.predict([sys.argv[3], ''], params=json.loads(sys.argv[4]))\n"
        "print(told.to_json(orient='records'))\n"
    )
    arguments = [default_uri(product.storage), undisturbed["run"], prompt, json.dumps(asked)]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    written, empty = json.loads(done.stdout.splitlines()[-1])
    assert prompt + written["continuation"] == undisturbed["evaluation"]["sample"]
    assert written["num_tokens"] > 0
    assert 0 < written["bits_per_byte"] < 20
    assert (empty["nats"], empty["num_tokens"], empty["bits_per_byte"]) == (0, 0, None)
    assert "Warning" not in done.stderr, done.stderr


@contextmanager
def full(disk: Path) -> Iterator[None]:
    """No byte is left on this filesystem."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            for size in (65536, 4096, 1):
                while True:
                    try:
                        file.write(bytes(size))
                    except OSError:
                        break
            yield
        finally:
            ballast.unlink()


def says(running: Running, words: str) -> bool:
    return words in running.out.read_text()


def test_a_full_disk(product: Product, small_disk: Path, undisturbed: Report) -> None:
    """Training goes on; only a last state that can't be written ends it badly, and what was lost is done again."""
    overrides = ("checkpoint.every=10", "checkpoint.keep_last=2")
    running = product.begin("full", *overrides, storage=small_disk)
    running.until("a checkpoint", lambda: says(running, "checkpoint written"))
    with full(small_disk):
        running.until("a checkpoint that fails", lambda: says(running, "checkpoint not written"))
        ended = running.stop()
    assert ended.code == 5
    assert "the run is stopped at step" in ended.err
    assert "it goes on from step" in ended.err

    running = product.begin("full", *overrides, storage=small_disk)
    running.until("a checkpoint", lambda: says(running, "checkpoint written"))
    with full(small_disk):
        ended = running.end()
    assert ended.code == 5
    assert "its last state could not be written" in ended.err
    assert "Traceback" not in ended.err
    assert "No space left on device" in ended.out
    assert product.report("full", small_disk)["checkpoints"]

    running = product.begin("full", *overrides, storage=small_disk)
    running.until("a checkpoint", lambda: says(running, "checkpoint written"))
    with full(small_disk):
        running.until("a checkpoint that fails", lambda: says(running, "checkpoint not written"))
    ended = running.end()
    assert ended.code == 0, ended.err
    report = product.report("full", small_disk)
    assert report["rejected_checkpoints"] == []  # what could not be written has left nothing
    assert_same_training(report, undisturbed)
    assert report["status"] == "complete"
    assert any(w["topic"] == "checkpoint" for w in report["warnings"])
