"""How many failures a run takes: a budget for each kind, and longer and longer pauses between restarts (pure).

A failure is charged to the budget of whoever is likely to blame. A new step forgives everything, so that a run that
gets on is never ended by failures, however many: budgets bound failures *in a row*. If a failure cost committed steps,
only a step beyond the highest ever reached forgives it: else a run that falls back again and again would go in circles.
So each run ends or makes progress: budgets are finite, and between two steps at most their sum can be charged.

Machines are expected to fail, so their budget is generous. A process that ends by its own doing (an exit code, SIGSEGV)
may be the code's fault, and has a small one; an exception that returns at the same step needs no more proof at all.

    failures without progress    1   2   3   4   5   6   7   8 ...
    pause before the restart     0   0   1   2   4   8  16  30 ... s      (backoff_s 1, max_backoff_s 30)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from elastictrain.config import ElasticSection
from elastictrain.events import Cause

Blame = Literal["user", "crash", "machine", "hang", "corruption", "engine", "memory", "start"]
"""Names of the budgets, as in `elastic.budgets`."""

MACHINE_FACTOR = 10
"""Of max_failures: the losses of machines that are taken in a row."""
FREE_RESTARTS = 2
"""Failures in a row after which the run restarts at once: one alone, or a second on its heels."""

_WORDS: dict[Blame, tuple[str, str]] = {
    "user": ("exceptions in the model's or data's code", "Look at the traceback"),
    "crash": ("processes that ended by themselves", "Look for a crash in native code or a call of exit at this step"),
    "machine": ("losses of processes or nodes", "Look at what kills them, or wait until the cluster is calmer"),
    "hang": ("hangs", "Look at the stacks in the report, or raise elastic.hang_patience_s if steps may take longer"),
    "corruption": ("corruptions of memory", "Look for a bad memory module on the nodes named in the report"),
    "engine": ("groups that could not be formed or whose collectives broke", "Look at the network between the nodes"),
    "memory": ("workers killed for want of memory", "Give the nodes more memory"),
    "start": ("workers that did not come up", "Look at the warnings about them"),
}
_CRASHES = ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGSYS", "SIGTRAP")


def blame(cause: Cause) -> Blame:
    """Whose budget a worker's or node's failure is charged to."""
    match cause.kind:
        case "exception":
            return "user"
        case "exit":
            return "crash"
        case "signal":
            return "crash" if cause.message.split()[0] in _CRASHES else "machine"
        case "hang":
            return "hang"
        case "corrupted":
            return "corruption"
        case "engine" | "collective":
            return "engine"
        case "oom":
            return "memory"
        case _:
            return "machine"


@dataclass(frozen=True, slots=True)
class Budgets:
    """What the user allows."""

    max_failures: int = 3
    own: Mapping[Blame, int] = field(default_factory=dict)
    """Budgets that do not follow from max_failures."""
    backoff_s: float = 1.0
    max_backoff_s: float = 30.0

    @classmethod
    def of(cls, elastic: ElasticSection) -> Budgets:
        """As configured."""
        chosen: dict[Blame, int | None] = {name: getattr(elastic.budgets, name) for name in get_args(Blame)}
        own = {name: count for name, count in chosen.items() if count is not None}
        return cls(elastic.max_failures, own, elastic.backoff_s, elastic.max_backoff_s)

    def allowed(self, to: Blame) -> int:
        """Failures in a row that this budget covers."""
        return self.own.get(to, self.max_failures * (MACHINE_FACTOR if to == "machine" else 1))

    def pause_s(self, failures: int) -> float:
        """How long to wait before the restart after so many failures in a row."""
        if failures <= FREE_RESTARTS:
            return 0.0
        doublings = min(failures - FREE_RESTARTS - 1, 100)  # 2.0**100 is beyond any cap
        return min(self.max_backoff_s, self.backoff_s * 2.0**doublings)

    def spent(self, to: Blame, since: str) -> str:
        """In words, that the last failure was one too many; `since` tells from where they count."""
        allowed, (what, advice) = self.allowed(to), _WORDS[to]
        knob = f"elastic.budgets.{to}"
        source = f"{knob} {allowed}" if to in self.own else f"elastic.max_failures {self.max_failures}"
        count = "none" if allowed == 0 else f"no more than {allowed}"
        return (
            f"This was number {allowed + 1} of the {what} {since}, and {source} allows {count}. {advice}; to try "
            f"longer, raise {knob} and submit again."
        )


@dataclass(frozen=True, slots=True)
class Account:
    """Failures since the last progress."""

    best_step: int
    """The highest step ever committed."""
    step: int
    """The highest since the state last fell back."""
    charged: Mapping[Blame, int] = field(default_factory=dict)
    lasting: Mapping[Blame, int] = field(default_factory=dict)
    """Those of `charged` that only a step beyond best_step forgives: the state fell back after them."""

    @property
    def failures(self) -> int:
        """All of them."""
        return sum(self.charged.values())

    def charge(self, to: Blame) -> Account:
        """One more failure."""
        return replace(self, charged={**self.charged, to: self.charged.get(to, 0) + 1})

    def commit(self, step: int) -> Account:
        """A step is committed."""
        if step > self.best_step:
            return Account(step, step)
        return replace(self, step=step, charged=self.lasting) if step > self.step else self

    def restore(self, step: int) -> Account:
        """The next generation starts from the state after this step."""
        return replace(self, step=step, lasting=self.charged) if step < self.step else self
