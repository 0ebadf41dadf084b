"""The goodput ledger: where every second of a run went, and every second of every worker (pure).

The time line from the first attempt's start to the last event is cut at every moment that the journal knows. Each
piece goes to the strongest claim on it (`claims.CLAIMS`), or to `idle` where there is none; a piece of a step is
divided by what the step's ranks waited for, on average. At each moment the run has as many workers as its newest
generation has ranks (before the first generation, as many as that has), and theirs is what the run's moment is. Slots
that it reserves beyond those are workers too, and their time is `spare`, but where nobody ran the run.

Counted in whole microseconds, so that the sums are exact whatever the events say: the buckets' to the wall time, and
the workers' to wall time times workers, spare ones among them. O(n log n) for n events, and 70 bytes each.
"""

from __future__ import annotations

import heapq
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, cast

from elastictrain.events import CheckpointWritten, Event, GenerationStarted, RunStarted, SlotsHeld, StepCommitted
from elastictrain.tracking.attempts import Attempt, split_attempts
from elastictrain.tracking.claims import CLAIMS, Span, claims_of
from elastictrain.tracking.committed import Committed, committed_steps
from elastictrain.tracking.step_times import StepTime, timer, times, waits_of

BUCKETS = (
    "down",
    "detection",
    "lost",
    "recovery",
    "resize",
    "checkpoint_stall",
    "snapshot_stall",
    "data_wait",
    "communication",
    "compute",
    "evaluation",
    "shutdown",
    "startup",
    "idle",
    "spare",
)
"""All buckets; `spare` is never the run's, only workers'. docs/report.md says what each means."""

PRODUCTIVE = ("compute", "communication")
"""What steps that stand are made of."""

_US = 1_000_000
_RANK = {claim: rank for rank, claim in enumerate(CLAIMS)}


@dataclass(frozen=True, slots=True)
class Goodput:
    """Microseconds by bucket, every bucket there, of the run or of a part of its time."""

    run_us: Mapping[str, int]
    workers_us: Mapping[str, int]
    """The same of all workers together."""

    @property
    def seconds(self) -> dict[str, float]:
        """Of the run, by bucket."""
        return {bucket: us / _US for bucket, us in self.run_us.items()}

    @property
    def worker_seconds(self) -> dict[str, float]:
        """Of all workers, by bucket."""
        return {bucket: us / _US for bucket, us in self.workers_us.items()}

    @property
    def wall_s(self) -> float:
        """The sum of the run's buckets."""
        return sum(self.run_us.values()) / _US

    @property
    def productive_s(self) -> float:
        """Time of the run in which steps that stand were computed."""
        return sum(self.run_us[bucket] for bucket in PRODUCTIVE) / _US

    @property
    def ratio(self) -> float:
        """The part of the wall time that is `productive_s`."""
        return self.productive_s / self.wall_s if self.wall_s else 0.0


def goodput(events: Sequence[Event], now: float | None = None) -> Goodput:
    """Fold the events, in journal order, up to the last one or, for a run that goes on, to `now`."""
    return over_time(events, 1, now)[0]


def over_time(events: Sequence[Event], parts: int, now: float | None = None) -> list[Goodput]:
    """The same for each of so many parts of the wall time, as equal as microseconds allow; `total` adds them up."""
    return of_attempts(split_attempts(events, now), committed_steps(events), _others(events), parts)


def of_attempts(attempts: Sequence[Attempt], steps: Committed, others: Sequence[Event], parts: int) -> list[Goodput]:
    """The same from events that are folded already; `others` are all but the committed steps."""
    if not attempts:
        return [_of_counts(Counter(), Counter())] * parts
    begun, ended = _us(attempts[0].begun_at), _us(max(a.ended_at for a in attempts))
    edges = [begun + (ended - begun) * part // parts for part in range(parts + 1)]
    return _between(edges, attempts, steps, others)


def since(events: Sequence[Event], begun: float, now: float | None = None, until: float | None = None) -> Goodput:
    """The same from this time on, to the end or `until` another; none of it where that has come already."""
    attempts = split_attempts(events, now)
    ended = max((a.ended_at for a in attempts), default=begun) if until is None else until
    edges = [_us(begun), max(_us(begun), _us(ended))]
    return _between(edges, attempts, committed_steps(events), _others(events))[0]


def _others(events: Iterable[Event]) -> list[Event]:
    return [event for event in events if not isinstance(event, StepCommitted)]


def _between(
    edges: Sequence[int], attempts: Sequence[Attempt], steps: Committed, others: Sequence[Event]
) -> list[Goodput]:
    """The ledger of the time between each two of these edges, in microseconds."""
    claims = _Claims(edges[0], edges[-1])
    undone = frozenset(steps.undone.places)
    for attempt in attempts:
        claims.add(claims_of(attempt, undone))
    claims.add(Span(a.ended_at, b.begun_at, "down") for a, b in pairwise(attempts))
    sizes, held = _Sizes(others), _Held(others)
    saved = {event.step for event in others if isinstance(event, CheckpointWritten)}
    run = [dict.fromkeys(BUCKETS, 0) for _ in edges[1:]]
    workers = [dict.fromkeys(BUCKETS, 0) for _ in edges[1:]]
    part, look = 0, timer(cast(Sequence[Event], steps.standing.whole))
    for piece in claims.cut([*edges, *sizes.changes, *held.changes]):
        while piece.start >= edges[part + 1]:
            part += 1
        size = sizes.at(piece.start)
        step = look(piece.place) if piece.place >= 0 else None
        assert step is None or isinstance(step, StepTime)
        for bucket, us in _divided(piece, step, saved):
            run[part][bucket] += us
            workers[part][bucket] += us * size
        if piece.claim != "down":
            workers[part]["spare"] += (piece.stop - piece.start) * max(held.at(piece.start) - size, 0)
    return [Goodput(*counts) for counts in zip(run, workers)]


def total(parts: Iterable[Goodput]) -> Goodput:
    """All of these together."""
    run, workers = Counter[str](), Counter[str]()
    for part in parts:
        run.update(part.run_us)
        workers.update(part.workers_us)
    return _of_counts(run, workers)


def productive_s(step: StepCommitted) -> float:
    """The part of a step that is `PRODUCTIVE`: what tokens/s count everywhere, in the run's state and its report."""
    waits = waits_of(step)
    return max(step.finished_at - step.begun_at - waits.data_s - waits.snapshot_s, 0.0)


def stalls(events: Sequence[Event], saved: Container[int]) -> dict[int, float]:
    """Longest wait of a rank for the copies of the state after each of these steps, in seconds: what saving it cost."""
    return {e.step - 1: e.snapshot_stall_s for e in times(events) if isinstance(e, StepTime) and e.step - 1 in saved}


def _of_counts(run: Counter[str], workers: Counter[str]) -> Goodput:
    return Goodput({bucket: run[bucket] for bucket in BUCKETS}, {bucket: workers[bucket] for bucket in BUCKETS})


def _us(at: float) -> int:
    return round(at * _US)


class _Sizes:
    """How many workers a run has, at any time (microseconds)."""

    def __init__(self, events: Iterable[Event]) -> None:
        begun = sorted((_us(e.at), e.index, e.world_size) for e in events if isinstance(e, GenerationStarted))
        self.changes = [at for at, _, _ in begun]
        self._sizes = [size for _, _, size in begun]

    def at(self, time_us: int) -> int:
        """Of the newest generation, or of the first one before that."""
        return self._sizes[max(bisect_right(self.changes, time_us) - 1, 0)] if self._sizes else 0


class _Held:
    """How many slots a run reserves, at any time (microseconds): none before an attempt tells of some."""

    def __init__(self, events: Iterable[Event]) -> None:
        told = sorted((e for e in events if isinstance(e, RunStarted | SlotsHeld)), key=lambda e: _us(e.at))
        self.changes = [_us(e.at) for e in told]
        self._slots = [0, *(e.slots if isinstance(e, SlotsHeld) else 0 for e in told)]

    def at(self, time_us: int) -> int:
        """As was told last."""
        return self._slots[bisect_right(self.changes, time_us)]


class _Piece(NamedTuple):
    start: int
    stop: int
    claim: str
    place: int
    """Of a step that stands, among the events; else -1."""


class _Claims:
    """All claims on the time from `begun` to `ended` (microseconds), 25 bytes each."""

    def __init__(self, begun: int, ended: int) -> None:
        self._begun, self._ended = begun, ended
        self._starts, self._stops, self._places = array("q"), array("q"), array("q")
        self._claims = array("b")

    def add(self, spans: Iterable[Span]) -> None:
        """Take them in, as far as they lie in that time."""
        for span in spans:
            start, stop = max(_us(span.start), self._begun), min(_us(span.stop), self._ended)
            if start < stop:
                self._starts.append(start)
                self._stops.append(stop)
                self._places.append(span.place)
                self._claims.append(_RANK[span.claim])

    def cut(self, more_cuts: Iterable[int]) -> Iterator[_Piece]:
        """The pieces of the time, in order, each with the strongest claim on it; that which ends first, of equals."""
        order = sorted(range(len(self._starts)), key=self._starts.__getitem__)
        cuts = [*sorted(c for c in more_cuts if self._begun < c < self._ended), self._ended]
        open_claims: list[tuple[int, int, int]] = []
        stops: list[int] = []
        at, waiting, cut = self._begun, 0, 0
        while at < self._ended:
            while waiting < len(order) and self._starts[order[waiting]] <= at:
                claim = order[waiting]
                heapq.heappush(open_claims, (self._claims[claim], self._stops[claim], waiting))
                heapq.heappush(stops, self._stops[claim])
                waiting += 1
            while open_claims and open_claims[0][1] <= at:
                heapq.heappop(open_claims)
            while stops and stops[0] <= at:
                heapq.heappop(stops)
            while cuts[cut] <= at:
                cut += 1
            stop = cuts[cut]
            if stops and stops[0] < stop:
                stop = stops[0]
            if waiting < len(order) and self._starts[order[waiting]] < stop:
                stop = self._starts[order[waiting]]
            if open_claims:
                rank, _, number = open_claims[0]
                yield _Piece(at, stop, CLAIMS[rank], self._places[order[number]])
            else:
                yield _Piece(at, stop, "idle", -1)
            at = stop


def _divided(piece: _Piece, step: StepTime | None, saved: Container[int]) -> Iterator[tuple[str, int]]:
    """The piece's time by bucket: a step's by its waits, the rest of which is computing.

    Before its update a step waits for the copies of the state before it: in a keeper, and for it if that was `saved`.
    """
    left = piece.stop - piece.start
    if step is None:
        yield piece.claim, left
        return
    copying = "checkpoint_stall" if step.step - 1 in saved else "snapshot_stall"
    waited = (("data_wait", step.data_s), (copying, step.snapshot_s), ("communication", step.peers_s))
    step_s = max(step.finished_at - step.begun_at, 1e-6)
    for bucket, seconds in waited:
        us = min(left, round((piece.stop - piece.start) * min(max(seconds, 0.0) / step_s, 1.0)))
        left -= us
        yield bucket, us
    yield "compute", left
