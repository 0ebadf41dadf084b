"""The table that recovery.py prints (pure): a row for each case and peer."""

from __future__ import annotations

from typing import Any

import machine
from figures import table

HEADER = ("case", "elastictrain s", "peer", "peer s", "ratio", "steps lost", "peer's")
TITLES = {
    "worker": "worker killed, ZeRO {}",
    "node": "node lost, ZeRO {}",
    "join": "node added, ZeRO {}",
    "checkpoint": "checkpoint, ZeRO {}",
}


def told(result: dict[str, Any]) -> str:
    """The result for people."""
    rows = [row for case in result["cases"] for row in rows_of(case)]
    splits = [split for case in result["cases"] for split in _splits(case)]
    return "\n".join(
        [machine.line(result["machine"]), f"all train {result['job']}", "", table(HEADER, rows), "", *splits]
    )


def rows_of(case: dict[str, Any]) -> list[list[str]]:
    """A case beside each of its peers, or alone."""
    title = TITLES[case["case"]].format(case["zero_stage"])
    if case["case"] == "checkpoint":
        later = _rows(case, f"{title}: training later by", "median_stalled_s")
        return later + _rows(case, f"{title}: ranks waited", "median_waited_s")
    rows = _rows(case, f"{title}: first new step", "median_s")
    return rows + (_rows(case, f"{title}: pause", "median_pause_s") if case["case"] == "join" else [])


def _rows(case: dict[str, Any], title: str, field: str) -> list[list[str]]:
    ours = case["elastictrain"]
    first = [title, _seconds(ours, field)]
    rows = []
    for peer in case["peers"].values():
        theirs, mine = peer.get(field), ours.get(field)
        if theirs is None or mine is None:
            ratio = "-"
        elif case["case"] == "checkpoint":
            ratio = f"{mine / theirs:.1%}"
        else:
            ratio = f"{theirs / mine:.1f}"
        rows.append([*first, peer["title"], _seconds(peer, field), ratio, _lost(ours), _lost(peer)])
    return rows or [[*first, "-", "-", "-", _lost(ours), "-"]]


def _seconds(found: dict[str, Any], field: str) -> str:
    if field not in found:
        return "never"
    recovered = "" if found.get("recovered") == found.get("of") else f" ({found['recovered']} of {found['of']})"
    return f"{found[field]:.2f}{recovered}"


def _lost(found: dict[str, Any]) -> str:
    return " ".join(map(str, found["steps_lost"])) if "steps_lost" in found else "-"


def _splits(case: dict[str, Any]) -> list[str]:
    title = TITLES[case["case"]].format(case["zero_stage"])
    if case["case"] == "checkpoint":
        return [
            f"{title}, {who}: {len(found['checkpoints'])} checkpoints of {case['num_bytes'] / 1e6:.0f} MB, complete "
            f"after {found['median_write_s']:.2f} s"
            for who, found in _all(case)
        ]
    told = []
    for who, found in _all(case):
        for run in found["runs"]:
            if "problem" in run:
                told.append(f"{title}, {who}: not back after {run['waited_s']:.0f} s; {run['problem']}")
        if "median_s" in found:
            back = [run for run in found["runs"] if "seconds" in run]
            sizes = sorted({run["world_size"] for run in back})
            phases = ", ".join(f"{phase} {took:.2f}" for phase, took in found["median_phases_s"].items())
            step_s = back[-1]["step_s"]
            told.append(
                f"{title}, {who}: {found['min_s']:.2f} to {found['max_s']:.2f} s, pause {found['median_pause_s']:.2f}, "
                f"goes on with {' or '.join(map(str, sizes))} ranks, a step took {step_s:.2f}; {phases}"
            )
    return told


def _all(case: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [("elastictrain", case["elastictrain"]), *((peer["title"], peer) for peer in case["peers"].values())]
