"""What the name of a reserved slot tells everybody on the cluster (pure): whose it is, and on which node.

Ray's list of placement groups says of one that waits neither who made it nor where it is to be; its name says both.
"""

from __future__ import annotations

import re
from typing import NamedTuple

ID_LENGTH = 12
"""Characters of Ray's node id that a name has: 48 random bits."""
_NAME = re.compile(rf"(?P<run>[^/]+)/(?P<kind>slot|trial-slot)-\d+-.+@(?P<node>[0-9a-f]{{{ID_LENGTH}}})")


class SlotName(NamedTuple):
    """Of a slot of some run."""

    run: str
    is_trial: bool
    """Whether a sweep gave it to one of its trials."""
    ray_id: str
    """The first characters of Ray's id of the node."""


def slot_name(run: str, number: int, node: str, ray_id: str, *, is_trial: bool) -> str:
    """Readable in Ray's dashboard, and by `read_name`."""
    return f"{run}/{'trial-slot' if is_trial else 'slot'}-{number}-{node}@{ray_id[:ID_LENGTH]}"


def read_name(name: str) -> SlotName | None:
    """None for what is no run's slot."""
    found = _NAME.fullmatch(name)
    return SlotName(found["run"], found["kind"] == "trial-slot", found["node"]) if found else None
