"""How fast a durable checkpoint is loaded under another layout, beside a plain copy of its files.

A transformer's state (masters and both moments, fp32) is written as the ranks of one layout hold it, and read as those
of others do: every rank in turn, into buffers that are there, as an engine's import does. The copy is
`shutil.copyfile` of the same files, in turns with the loads; all read from the page cache, so what is compared is the
work and not the drive. Extra memory is what the process grew by while it loaded.

    python benchmarks/reshard.py                       a table; about a minute, 4 GB of memory, 3 GB of disk
    python benchmarks/reshard.py --gigabytes 0.2       smaller
    python benchmarks/reshard.py --json                one JSON object
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import machine
import numpy as np
from figures import table

from elastictrain.checkpoint.store import CheckpointStore
from elastictrain.config import TrainConfig
from elastictrain.plan.layout import Layout
from elastictrain.plan.part import Part, part_of
from elastictrain.state.manifest import Manifest
from elastictrain.state.slab import Slab
from elastictrain.state.tensors import PARTS, Fragment, LogicalTensor, ShardIndex
from elastictrain.storage import Storage
from elastictrain.workloads.language_model import LanguageModel

WRITTEN = Layout(4, 1, 1, 1)
READ = (Layout(3, 1, 1, 1), Layout(1, 1, 1, 1, tp=2), Layout(2, 1, 1, 1, pp=2), Layout(1, 1, 1, 1, pp=2, tp=2))
VOCAB_SIZE = 8192
BYTES_A_PARAMETER = 12
BAR = 0.5


def workload_of(gigabytes: float) -> LanguageModel:
    """A transformer with about so much state."""
    width, layers = 1024, 2
    while True:
        model = {"hidden_size": width, "num_layers": layers, "num_heads": 16, "num_kv_heads": 16}
        config = TrainConfig.from_dict({"model": model, "data": {"vocab_size": VOCAB_SIZE}})
        workload = LanguageModel(config, VOCAB_SIZE)
        if sum(map(_numel, workload.parameter_shapes.values())) * BYTES_A_PARAMETER >= gigabytes * 1e9:
            return workload
        layers += 1


def fragments_of(workload: LanguageModel, layout: Layout, rank: int) -> tuple[Fragment, ...]:
    """What a rank holds: of its part of the model the share that ZeRO-1 gives it, all parameters end to end."""
    part, place = part_of(workload.shape, layout, rank), layout.place(rank)
    slabs = workload.slabs(part)
    sizes = {
        name: _share_of(shape, slabs.get(name))
        for name, shape in workload.parameter_shapes.items()
        if _is_in(name, part)
    }
    total = sum(sizes.values())
    low, high = total * place.dp // layout.dp, total * (place.dp + 1) // layout.dp
    found: list[Fragment] = []
    for kind in PARTS:
        at = 0
        for name, size in sizes.items():
            start, stop = max(low - at, 0), min(high - at, size)
            if start < stop:
                found += _placed(f"{kind}/{name}", slabs.get(name), start, stop - start)
            at += size
    return tuple(found)


def _placed(tensor: str, slab: Slab | None, start: int, numel: int) -> Iterator[Fragment]:
    return iter((Fragment(tensor, start, numel),)) if slab is None else slab.fragments(tensor, start, numel)


def _share_of(shape: tuple[int, ...], slab: Slab | None) -> int:
    if slab is None:
        return _numel(shape)
    return slab.width if slab.width == slab.stride else _numel(shape) // slab.stride * slab.width


def _is_in(name: str, part: Part) -> bool:
    if name.startswith("blocks."):
        return int(name.split(".")[1]) in part.blocks
    return part.first if name.startswith("embedding") else part.last


def _numel(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def write(workload: LanguageModel, store: CheckpointStore) -> int:
    """One checkpoint of random numbers; its bytes."""
    generator, entries = np.random.default_rng(0), []
    for rank in range(WRITTEN.world_size):
        index = ShardIndex(fragments_of(workload, WRITTEN, rank))
        data = generator.random(index.numel, np.float32)
        entries.append(store.write_shard(1, rank, WRITTEN.world_size, index, data.data.cast("B")))
    tensors = tuple(
        LogicalTensor(f"{kind}/{name}", shape) for kind in PARTS for name, shape in workload.parameter_shapes.items()
    )
    manifest = Manifest("reshard", 1, 1, "00" * 32, 0.0, WRITTEN.to_json(), {}, tensors, tuple(entries), time.time())
    store.commit(manifest)
    return manifest.num_bytes


def load(workload: LanguageModel, store: CheckpointStore, layout: Layout) -> tuple[float, int, int]:
    """Seconds, bytes, and by how many bytes memory grew meanwhile; every rank of the layout in turn."""
    seconds, num_bytes, grown = 0.0, 0, 0
    for rank in range(layout.world_size):
        fragments = fragments_of(workload, layout, rank)
        buffer = np.ones(sum(f.numel for f in fragments), np.float32).data.cast("B")
        targets, at = [], 0
        for fragment in fragments:
            targets.append((fragment, buffer[at : at + 4 * fragment.numel]))
            at += 4 * fragment.numel
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before, begun = _resident("VmRSS"), time.perf_counter()
        store.open(1).fill(targets)
        seconds += time.perf_counter() - begun
        grown = max(grown, _resident("VmHWM") - before)
        num_bytes += len(buffer)
    return seconds, num_bytes, grown


def _resident(field: str) -> int:
    rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(rows[field].split()[0]) * 1024


def copy(folder: Path, to: Path) -> float:
    """Seconds of copying the checkpoint's shard files."""
    files = sorted(folder.rglob("*.safetensors"))
    begun = time.perf_counter()
    for file in files:
        shutil.copyfile(file, to / file.name)
    return time.perf_counter() - begun


def measure(gigabytes: float, rounds: int) -> dict[str, Any]:
    """Loads and copies in turns."""
    found, workload = machine.describe(), workload_of(gigabytes)
    folder = Path(tempfile.mkdtemp(prefix="reshard-"))
    try:
        store = CheckpointStore(Storage.open(str(folder / "storage")))
        num_bytes = write(workload, store)
        (folder / "copy").mkdir()
        copies, loads = [], {str(layout): list[tuple[float, int, int]]() for layout in READ}
        copy(folder / "storage", folder / "copy")  # the pages of both are there from now on
        for _ in range(rounds):
            for layout in READ:
                copies.append(copy(folder / "storage", folder / "copy"))
                loads[str(layout)].append(load(workload, store, layout))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    plain = num_bytes / median(copies)
    return {
        "machine": found,
        "bytes": num_bytes,
        "copy_bytes_per_s": plain,
        "bar": BAR,
        "loads": {
            name: {
                "bytes_per_s": median(size / seconds for seconds, size, _ in taken),
                "ratio": median(size / seconds for seconds, size, _ in taken) / plain,
                "extra_bytes": max(grown for _, _, grown in taken),
            }
            for name, taken in loads.items()
        },
    }


def told(result: dict[str, Any]) -> str:
    """The result as a table for people."""
    rows = [
        [name, f"{of['bytes_per_s'] / 1e9:.2f} GB/s", f"{of['ratio']:.2f}", f"{of['extra_bytes'] / 1e6:.1f} MB"]
        for name, of in result["loads"].items()
    ]
    what = f"{result['bytes'] / 1e9:.2f} GB of {WRITTEN}, read as"
    below = f"a plain copy of the files: {result['copy_bytes_per_s'] / 1e9:.2f} GB/s; bar: {result['bar']} of it"
    return "\n".join(
        [machine.line(result["machine"]), "", table([what, "speed", "of a copy's", "extra memory"], rows), "", below]
    )


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.1, help="state of the model (default 1.1)")
    parser.add_argument("--rounds", type=int, default=3, help="loads of each layout (default 3)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    result = measure(arguments.gigabytes, arguments.rounds)
    print(json.dumps(result, indent=2) if arguments.json else told(result))


if __name__ == "__main__":
    main()
