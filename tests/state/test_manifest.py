"""A manifest that can be read is one that can be trusted to describe a whole state."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest

from elastictrain.errors import CheckpointError
from elastictrain.state.manifest import Manifest, ShardEntry
from elastictrain.state.tensors import Fragment, LogicalTensor, ShardIndex


def entry(rank: int, *fragments: Fragment) -> ShardEntry:
    index = ShardIndex(fragments)
    return ShardEntry(f"shard-{rank:05d}-of-00002.safetensors", index.num_bytes + 200, f"{rank}" * 64, index)


def manifest(**changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "run": "demo",
        "step": 12,
        "samples": 192,
        "sample_chain": "ab" * 32,
        "loss": 0.1 + 0.2,
        "layout": {"dp": 2, "zero_stage": 1},
        "scalars": {"optimizer_step": 12, "loss_scale": 65536.0},
        "tensors": (LogicalTensor("param/w", (3, 4)), LogicalTensor("param/s", ())),
        "shards": (
            entry(0, Fragment("param/w", 0, 5), Fragment("param/s", 0, 1)),
            entry(1, Fragment("param/w", 5, 7)),
        ),
        "created_at": 1_700_000_000.25,
    }
    return Manifest(**(fields | changes))


def test_round_trip() -> None:
    assert Manifest.from_json(manifest().to_json()) == manifest()
    assert Manifest.from_json(manifest().to_json().encode()) == manifest()


def test_a_diverged_loss_is_still_json() -> None:
    text = manifest(loss=math.nan).to_json()
    assert json.loads(text)["loss"] is None
    assert math.isnan(Manifest.from_json(text).loss)


def test_replicated_shards_are_whole_too() -> None:
    everything = Fragment("param/w", 0, 12), Fragment("param/s", 0, 1)
    assert manifest(shards=(entry(0, *everything), entry(1, *everything))).num_bytes == 2 * (52 + 200)


def damage(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def apply(data: Any) -> None:
        *parents, last = (int(key) if key.isdigit() else key for key in path.split("."))
        for key in parents:
            data = data[key]
        if value is KeyError:
            del data[last]
        else:
            data[last] = value

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damage("format_version", 2), "format_version 2, this program reads 1"),
        (damage("format_version", KeyError), "no format_version"),
        (damage("step", KeyError), "no step"),
        (damage("step", "12"), "step '12'"),
        (damage("step", True), "step True"),
        (damage("step", -1), "negative"),
        (damage("samples", 1.5), "samples 1.5"),
        (damage("loss", "low"), "loss 'low'"),
        (damage("scalars", {"optimizer_step": "twelve"}), "optimizer_step 'twelve'"),
        (damage("tensors.0", ["param/w", [3, -4]]), "where a tensor"),
        (damage("tensors.0", "param/w"), "where a tensor"),
        (damage("tensors.1", ["param/w", []]), "the tensor param/w twice"),
        (damage("shards.0.file", "../../etc/passwd"), "'../../etc/passwd'"),
        (damage("shards.0.file", "/etc/passwd"), "'/etc/passwd'"),
        (damage("shards.0.file", "shard-00000-of-00002.safetensors\n"), "not a shard"),
        (damage("shards.0.file", "shard-00000-of-00002.pt"), "not a shard"),
        (damage("shards.0.file", "shard-00001-of-00002.safetensors"), "twice"),
        (damage("shards.0.sha256", "ABC"), "no SHA-256"),
        (damage("shards.0.num_bytes", 8), "8 bytes, but its fragments need 24"),
        (damage("shards.0.index.0", ["param/w", 0]), "wrong shard index"),
        (damage("shards.0.index.0", ["param/w", -1, 5]), "wrong shard index"),
        (damage("shards.0.index", 7), "index 7"),
        (damage("shards.0", None), "NoneType where an object"),
        (damage("shards.1.index.0", ["param/w", 6, 6]), r"no shard holds param/w\[5:12\]"),
        (damage("shards.1.index.0", ["param/w", 5, 8]), "that tensor has 12 elements"),
        (damage("shards.1.index", [["param/w", 5, 7], ["param/x", 0, 1]]), "lists no such tensor"),
        (damage("shards", []), "no shard holds"),
    ],
)
def test_what_is_wrong_is_named(change: Callable[[Any], None], message: str) -> None:
    data = json.loads(manifest().to_json())
    change(data)
    with pytest.raises(CheckpointError, match=message):
        Manifest.from_json(json.dumps(data))


@pytest.mark.parametrize("text", [b"", b"{", b"\x80\x04\x95pickle", b"[" * 100_000, b"\xff\xfe", "[]", "null"])
def test_what_is_no_manifest_at_all(text: bytes | str) -> None:
    with pytest.raises(CheckpointError, match="manifest"):
        Manifest.from_json(text)
