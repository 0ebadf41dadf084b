"""How often to take snapshots (pure): each step, unless training waits too long for them.

A snapshot is copied and sent to the buddy while the next step computes; training waits only for what does not fit
beside it. So the wait is seen, not modelled: above `MOST` of the time the interval doubles, below `LEAST` it is halved
again. A failure costs as many steps as the interval has.
"""

from __future__ import annotations

MOST = 0.01
LEAST = 0.001
"""At half the interval the wait could be much more than double: what did not fit before would not fit again."""
WINDOW_STEPS = 32
TRIAL_STEPS = 4
"""A shorter interval is judged so soon, when it is tried again."""
LONGEST = 64
_FIRST_PATIENCE = 8
"""Windows without waiting before a shorter interval is tried again; twice as many after each trial that failed."""


class SnapshotInterval:
    """Of one attempt. `fixed` is the user's choice; None leaves it to what is seen."""

    def __init__(self, fixed: int | None) -> None:
        self.every = fixed or 1
        """Steps between snapshots."""
        self.told = self.every
        """The longest that people have been told of."""
        self._adapts = fixed is None
        self._steps = 0
        self._step_s = self._stall_s = 0.0
        self._calm_windows, self._patience = 0, _FIRST_PATIENCE
        self._trial = False

    @property
    def words(self) -> str:
        """What a longer interval means."""
        return (
            f"training waits too long for its copies in memory: one every {self.every} steps from now on, and a "
            f"failure may cost as many (snapshot.every=1 takes one each step)"
        )

    def step(self, step_s: float, stall_s: float) -> bool:
        """A step took so long, and training waited so long for snapshots in it; whether `every` is another now."""
        self._steps += 1
        self._step_s += step_s
        self._stall_s += stall_s
        window = TRIAL_STEPS if self._trial else WINDOW_STEPS
        if not self._adapts or self._steps < max(window, 4 * self.every):
            return False
        share = self._stall_s / self._step_s if self._step_s > 0 else 0.0
        self._steps, self._step_s, self._stall_s = 0, 0.0, 0.0
        before, trial, self._trial = self.every, self._trial, False
        if share > MOST:
            self.every, self._calm_windows = min(2 * self.every, LONGEST), 0
            self._patience = 2 * self._patience if trial else _FIRST_PATIENCE
        elif share < LEAST:
            self._calm_windows += 1
            if self._calm_windows >= self._patience and self.every > 1:
                self.every, self._calm_windows, self._trial = self.every // 2, 0, True
        else:
            self._calm_windows = 0
        return self.every != before
