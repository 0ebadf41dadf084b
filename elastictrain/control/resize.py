"""When a larger world pays, and which nodes to leave alone (pure).

Growing costs a pause, and is worth the steps that it saves until the world changes again. How long that will be is
judged by how often nodes were lost lately: on a market that flickers, a node that comes back for a moment is not worth
a pause; after a calm day, eight workers more for ten thousand are worth one. A node on which far more breaks than on
the others is left alone for a while, as long as the rest suffices.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

WINDOW_S = 600.0
"""What happened longer ago says nothing about the next minutes."""
PAYS_FACTOR = 3.0
"""The gain must be so many times the pause: the estimate of either is rough."""

QUARANTINE_AFTER = 3
"""Failures on one node within `QUARANTINE_WINDOW_S`, and four times as many as on another node on average."""
QUARANTINE_WINDOW_S = 3600.0
QUARANTINE_S = 1800.0
_UNEVEN = 4.0


def lasting_s(losses_at: Sequence[float], now: float, since: float) -> float:
    """How long the world can be expected to stay as it is, which it has been since then.

    As long as it has been calm; and of the window the part that losses leave, one being taken for granted.
    """
    calm_s = now - max([since, *losses_at])
    return max(WINDOW_S / (1 + sum(at > now - WINDOW_S for at in losses_at)), calm_s)


def growth_pays(size: int, larger: int, pause_s: float, losses_at: Sequence[float], now: float, since: float) -> bool:
    """Whether to pause for `pause_s` seconds and go on with `larger` workers in place of `size`, there since then.

    With n workers a step takes time in proportion to 1/n, so of the time until the next change the share
    1 - size/larger is gained.
    """
    return lasting_s(losses_at, now, since) * (1 - size / larger) > PAYS_FACTOR * pause_s


def nodes_to_avoid(
    failures: Sequence[tuple[float, str]], slots: Mapping[str, int], needed: int, now: float
) -> frozenset[str]:
    """Nodes of `slots` that fail too often, worst first, as long as the others have room for `needed` workers.

    `failures` are (time, node): of processes that died or hung there, of memory that changed, of engines that could not
    be built, and of the node itself; errors of the user's code are nobody's.
    """
    recent = Counter(node for at, node in failures if at > now - QUARANTINE_WINDOW_S and node in slots)
    room, avoided = sum(slots.values()), set[str]()
    for node, count in sorted(recent.items(), key=lambda item: (-item[1], item[0])):
        others = [recent[other] for other in slots if other != node]
        uneven = others and count >= _UNEVEN * max(sum(others) / len(others), 0.5)
        if count >= QUARANTINE_AFTER and uneven and room - slots[node] >= needed:
            avoided.add(node)
            room -= slots[node]
    return frozenset(avoided)
