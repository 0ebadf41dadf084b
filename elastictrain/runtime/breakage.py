"""A collective that broke for a reason that has not shown yet.

Its ranks' nodes are asked at once whether they are there. What broke it, a dead worker or node, shows within
`PATIENCE_S` from elsewhere; else the group is broken for no known reason, and can't go on either.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

from elastictrain.events import Cause
from elastictrain.runtime.probe import Probe

PATIENCE_S = 3.0
"""Ray needs 1 to 2 s to tell of a node's end."""


class Breakage:
    """Of the current group; `clear` when it is fenced."""

    def __init__(self) -> None:
        self._sign: tuple[float, Cause] | None = None
        self._probe: Probe | None = None

    @property
    def first_sign(self) -> float | None:
        """When it broke (unix time), while the reason is not known."""
        return self._sign[0] if self._sign is not None else None

    def note(self, cause: Cause, at: float | None, raylets: Mapping[str, tuple[str, int]]) -> None:
        """A rank's collective broke; `raylets` are where the group's nodes listen."""
        if self._sign is None:
            self._sign = at or time.time(), cause
            self._probe = Probe(dict(raylets))

    def silent(self) -> Iterable[str]:
        """Nodes that do not answer, newly found."""
        return self._probe.silent() if self._probe is not None else ()

    def unexplained(self) -> tuple[float, Cause] | None:
        """When it broke and what it said, once no reason is to be hoped for any more; told once."""
        if self._sign is None or time.time() <= self._sign[0] + PATIENCE_S:
            return None
        sign, self._sign = self._sign, None
        return sign

    def clear(self) -> None:
        """Nothing is broken now."""
        self._sign = None
        if self._probe is not None:
            self._probe.close()
            self._probe = None
