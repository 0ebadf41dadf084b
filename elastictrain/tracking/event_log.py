"""Events in journal order, packed: a month of steps in hundreds of megabytes, not in gigabytes.

A committed step as most are is 152 bytes here and some 800 as an object. It comes out equal to what went in, made anew
each time that it is asked for (3 us); every other event is kept as it is.
"""

from __future__ import annotations

import re
import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar, overload

from elastictrain.events import Event, StepCommitted, Waits

T = TypeVar("T")

_ROW = struct.Struct("<4q11d32s")
_TIME = struct.Struct("<2q 16x d 8x 2d 24x 4d")
"""The part of a row that `time_at` tells."""
_HASH = re.compile("[0-9a-f]{64}")


class EventLog(Sequence[Event]):
    """Grows at its end only."""

    def __init__(self, events: Iterable[Event] = ()) -> None:
        self._places = array("q")
        """Of each event: the number of its row, or -1 - its place among the others."""
        self._rows = bytearray()
        self._others: list[Event] = []
        self._gauge_names: tuple[str, ...] | None = None
        """Those of the first step; a step with others is no row."""
        self._gauges = array("d")
        self.extend(events)

    def append(self, event: Event) -> None:
        """Take it in."""
        if isinstance(event, StepCommitted) and self._is_plain(event):
            assert event.waits is not None
            self._places.append(len(self._rows) // _ROW.size)
            self._gauges.extend(event.gauges.values())
            self._rows += _ROW.pack(
                event.generation,
                event.step,
                event.num_samples,
                event.num_tokens,
                event.at,
                event.loss,
                event.begun_at,
                event.finished_at,
                event.learning_rate,
                event.grad_norm,
                event.data_wait_s,
                event.snapshot_stall_s,
                event.waits.data_s,
                event.waits.peers_s,
                event.waits.snapshot_s,
                bytes.fromhex(event.sample_chain),
            )
        else:
            self._places.append(-1 - len(self._others))
            self._others.append(event)

    def extend(self, events: Iterable[Event]) -> None:
        """Take them in."""
        for event in events:
            self.append(event)

    def _is_plain(self, step: StepCommitted) -> bool:
        if step.skipped is not None or step.waits is None or not _HASH.fullmatch(step.sample_chain):
            return False
        if self._gauge_names is None:
            self._gauge_names = tuple(step.gauges)
        return tuple(step.gauges) == self._gauge_names

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Event: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Event]: ...
    def __getitem__(self, index: int | slice) -> Event | Sequence[Event]:
        if isinstance(index, slice):
            return [self._at(place) for place in self._places[index]]
        return self._at(self._places[index])

    def __iter__(self) -> Iterator[Event]:
        return map(self._at, self._places)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(mine == its for mine, its in zip(self, other))

    __hash__ = None  # type: ignore[assignment]  # it grows

    def time_at(self, index: int) -> tuple[float, ...] | Event:
        """Of a step that is packed, the fields of a `StepTime`, at a fifth of the cost; else the event."""
        place = self._places[index]
        return self._others[-1 - place] if place < 0 else _TIME.unpack_from(self._rows, place * _ROW.size)

    def _at(self, place: int) -> Event:
        if place < 0:
            return self._others[-1 - place]
        generation, step, samples, tokens, at, loss, begun, finished, rate, norm, data, stall, *waits, digest = (
            _ROW.unpack_from(self._rows, place * _ROW.size)
        )
        names = self._gauge_names or ()
        gauges = dict(zip(names, self._gauges[place * len(names) : (place + 1) * len(names)]))
        return StepCommitted(
            at, generation, step, loss, digest.hex(), samples, tokens, begun, finished, rate, norm, data, stall,
            None, Waits(*waits), gauges,
        )  # fmt: skip


class View(Sequence[T]):
    """Some of a sequence's elements, by their places in it: nothing is copied."""

    def __init__(self, whole: Sequence[T], places: Sequence[int]) -> None:
        self.whole, self.places = whole, places

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[T, ...]: ...
    def __getitem__(self, index: int | slice) -> T | tuple[T, ...]:
        if isinstance(index, slice):
            return tuple(self.whole[place] for place in self.places[index])
        return self.whole[self.places[index]]

    def __iter__(self) -> Iterator[T]:
        return map(self.whole.__getitem__, self.places)
