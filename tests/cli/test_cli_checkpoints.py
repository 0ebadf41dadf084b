"""`elastictrain checkpoints`: what is kept, what is damaged, and who signed it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from kept_run import KeptRun, told

ROOT = Path(__file__).parents[2]


def test_checkpoints_json_lists_the_newest_first(kept: KeptRun) -> None:
    listed = json.loads(told(kept, "checkpoints", "quickstart", "--json").stdout)
    assert [c["step"] for c in listed] == [3, 2]
    assert listed[0]["uri"] == f"{kept.folder}/checkpoints/step-00000003"
    files = Path(listed[0]["uri"]).iterdir()
    assert listed[0]["bytes"] == sum(f.stat().st_size for f in files)
    assert len(listed[0]["sha256"]) == 64
    assert {c["verified"] for c in listed} == {None}


def test_whole_checkpoints_verify(kept: KeptRun) -> None:
    listed = json.loads(told(kept, "checkpoints", "quickstart", "--verify", "--json").stdout)
    assert {c["verified"] for c in listed} == {True}
    assert "verified" in told(kept, "checkpoints", "quickstart", "--verify").stdout


def flip_a_bit(folder: Path) -> str:
    shard = folder / "shard-00000-of-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    return "SHA-256"


def truncate(folder: Path) -> str:
    shard = folder / "shard-00000-of-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])
    return "truncated"


def lose_the_manifest(folder: Path) -> str:
    (folder / "manifest.json").unlink()
    return "no manifest.json"


def lose_a_shard(folder: Path) -> str:
    (folder / "shard-00000-of-00001.safetensors").unlink()
    return "is not there"


def rewrite_the_manifest(folder: Path) -> str:
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace("5.0", "1.0"))
    return "the run's record says"


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, lose_the_manifest, lose_a_shard, rewrite_the_manifest])
def test_a_damaged_checkpoint_is_named_and_the_others_stand(kept: KeptRun, damage: Callable[[Path], str]) -> None:
    problem = damage(kept.folder / "checkpoints" / "step-00000003")
    newest, older = json.loads(told(kept, "checkpoints", "quickstart", "--verify", "--json", status=1).stdout)
    assert newest["verified"] is False
    assert problem in newest["problem"]
    assert (older["step"], older["verified"], older["problem"]) == (2, True, None)
    assert "DAMAGED" in told(kept, "checkpoints", "quickstart", "--verify", status=1).stdout


def test_signatures_are_told_and_what_is_not_signed_is_damaged(kept: KeptRun, tmp_path: Path) -> None:
    key, other = tmp_path / "key", tmp_path / "other"
    for path, character in ((key, "5"), (other, "6")):
        path.touch(0o600)
        path.write_text(character * 64)

    def verified(*arguments: str | Path, status: int = 0) -> list[tuple[bool, str | None]]:
        out = told(kept, "checkpoints", "quickstart", "--verify", "--json", *arguments, status=status).stdout
        return [(c["verified"], c["signature"]) for c in json.loads(out)]

    assert verified() == [(True, "none")] * 2
    unsigned = told(kept, "checkpoints", "quickstart", "--verify", "--signing-key-file", key, status=1).stdout
    assert "DAMAGED" in unsigned
    assert "it is not signed" in unsigned
    assert "--signing-key-file" in told(kept, "checkpoints", "quickstart", "--sign", status=2).output
    with kept.driven():
        refused = told(kept, "checkpoints", "quickstart", "--sign", "--signing-key-file", key, status=2).output
        assert "is being trained now" in refused
    flip_a_bit(kept.folder / "checkpoints" / "step-00000003")
    signed = told(kept, "checkpoints", "quickstart", "--sign", "--signing-key-file", key, status=1).stdout
    assert ("DAMAGED" in signed, "verified  signed" in signed) == (True, True)
    assert verified("--signing-key-file", key, status=1) == [(False, None), (True, "valid")]
    assert verified(status=1) == [(False, "none"), (True, "unchecked")]
    assert verified("--signing-key-file", other, status=1) == [(False, None)] * 2


def test_what_was_never_completed_is_not_listed(kept: KeptRun) -> None:
    newest = kept.folder / "checkpoints" / "step-00000003"
    half_written = shutil.copytree(newest, newest.with_name("step-00000004"))
    lose_the_manifest(half_written)

    def listed() -> list[int]:
        return [c["step"] for c in json.loads(told(kept, "checkpoints", "quickstart", "--verify", "--json").stdout)]

    assert listed() == [3, 2]
    with kept.driven():
        assert listed() == [3, 2]
        lose_the_manifest(newest)  # as a prune under way does first
        assert listed() == [2]


def test_a_run_without_checkpoints_says_which_knob_makes_them(tmp_path: Path) -> None:
    empty = KeptRun(tmp_path / "runs")
    assert "checkpoint.every" in told(empty, "checkpoints", "quickstart").stdout
    assert json.loads(told(empty, "checkpoints", "quickstart", "--json").stdout) == []
