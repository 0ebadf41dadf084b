"""The MLflow record of whole runs, and what happens while the store or the disk can't take anything.

About 60 s on two cores.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from product import Product, Report, Running, assert_recorded, assert_same_training


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
