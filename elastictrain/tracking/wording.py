"""Numbers in words that people read."""

from __future__ import annotations

from typing import Any

from elastictrain.events import DRIVER_LOST


def seconds_text(seconds: float | None) -> str:
    """A duration in the unit that fits: '12 ms', '0.45 s', '3 min 20 s', '2 h 5 min'; a dash for None."""
    if seconds is None:
        return "–"
    if seconds < 0.0995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def skip_text(reason: str, loss: float, limit: float | None) -> str:
    """Why a step did not count: 'loss nan', 'loss 9.31 above 3.2', 'gradient not finite'."""
    if reason == "gradient":
        return "gradient not finite"
    return f"loss {loss:.4g}" + ("" if limit is None else f" above {limit:.4g}")


def layout_text(generation: dict[str, Any]) -> str:
    """A generation's layout in words: '2 workers, dp 2, zero_stage 1, ...'."""
    return ", ".join(
        [count_text(generation["world_size"], "worker"), *(f"{k} {v}" for k, v in generation["layout"].items())]
    )


def bytes_text(num_bytes: float) -> str:
    """A size in the unit that fits: '12.0 MB'."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def energy_text(energy: dict[str, Any]) -> str:
    """A report's energy in words: '1.25 kWh, 0.31 kWh for a million tokens'."""
    a_million = energy["joules_per_million_tokens"]
    each = "" if a_million is None else f", {a_million / 3.6e6:.3g} kWh for a million tokens"
    some = f" on {energy['nodes_that_tell']} of {energy['nodes']} nodes"
    where = some if energy["nodes_that_tell"] < energy["nodes"] else ""
    return f"{energy['joules'] / 3.6e6:.3g} kWh of processors and GPUs{where}{each}"


def count_text(number: int, noun: str) -> str:
    """'1 step', '2,000 steps'."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def source_text(source: str) -> str:
    """Where a generation's state came from: 'memory', 'a checkpoint' or 'the beginning'."""
    return {"durable": "a checkpoint", "fresh": "the beginning"}.get(source, source)


def who_text(failure: dict[str, Any]) -> str:
    """Who failed, of a report's failure: 'rank 1', 'rank 0, 1', 'the driver', or 'all ranks' where it is nobody's."""
    if failure["ranks"]:
        return "rank " + ", ".join(map(str, failure["ranks"]))
    return "the driver" if failure["kind"] == DRIVER_LOST else "all ranks"


def place_text(pid: int, node: str) -> str:
    """Where a process is or was, as far as known: a node that is lost has no pid, nor has one that never told it."""
    return f"pid {pid}, node {node}" if pid else f"node {node}"
