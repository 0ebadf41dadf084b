"""Which peers there are, and which of them a case is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from peers import on_ray, on_torchft, on_torchrun

if TYPE_CHECKING:
    from strike_peer import Peer

NAMES = ("ray_train", "torchrun", "torchft")


def names(text: str) -> list[str]:
    """Of `all`, `none`, or names with commas; `all` leaves out what is not installed, a name of that is an error."""
    if text == "none":
        return []
    if text == "all":
        return [name for name in NAMES if name != "torchft" or on_torchft.installed()]
    found = text.split(",")
    unknown = [name for name in found if name not in NAMES]
    if unknown:
        raise ValueError(f"--peers {text}: no peer is called {unknown[0]!r}; there are {', '.join(NAMES)}")
    if "torchft" in found and not on_torchft.installed():
        raise ValueError("--peers torchft: it is not installed; benchmarks/README.md tells how")
    return found


def for_case(case: str, chosen: Sequence[str], sharded_only: bool = False) -> list[Peer]:
    """Whoever can take part, each in the ways that tell something.

    With `sharded_only` without those that train data-parallel: their result does not depend on the ZeRO stage.
    """
    ray_train: list[Peer] = [on_ray.ZERO] if case in ("worker", "checkpoint") else [on_ray.ZERO, on_ray.DDP]
    peers: dict[str, list[Peer]] = {
        "ray_train": ray_train,
        "torchrun": [on_torchrun.TORCHRUN],
        "torchft": [on_torchft.TORCHFT],
    }
    found = [peer for name in NAMES if name in chosen for peer in peers[name]]
    if case == "checkpoint":  # both sides write the same state, sharded
        return [peer for peer in found if peer.sharded]
    return [peer for peer in found if peer.sharded or not sharded_only]
