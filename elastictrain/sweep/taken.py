"""What of the cluster no sweep may count as its own: slots that ordinary runs hold or wait for (pure)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from elastictrain.runtime.slot_name import read_name
from elastictrain.sweep.share import Taken

WORKER_NEEDS = {"CPU", "GPU"}
"""A group without any of them, as Ray Tune makes for each trial, takes no worker's place."""
OTHERS = "other programs"
"""Whose placement groups have names that tell nothing."""


def taken_by_others(groups: Iterable[Mapping[str, Any]], nodes: Collection[str]) -> list[Taken]:
    """From Ray's table of placement groups, and the ids of the nodes that live. O(groups x nodes) at worst.

    A bundle that is placed is held by whoever is no sweep's trial. One that is not waits, where its name says the node.
    """
    found = []
    for group in groups:
        name = read_name(group["name"])
        if group["state"] == "REMOVED" or (name and name.is_trial):
            continue
        of_name = next((node for node in nodes if node.startswith(name.ray_id)), "") if name else ""
        for bundle, demand in group["bundles"].items():
            node = group["bundles_to_node_id"].get(bundle, "")
            if (node or of_name) in nodes and demand.keys() & WORKER_NEEDS:
                found.append(Taken(f"run {name.run}" if name else OTHERS, node or of_name, demand, waits=not node))
    return found
