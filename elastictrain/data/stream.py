"""The stream that a rank reads: its micro-batches of one step after another, loaded ahead on one thread.

The stream begins at any step at no cost, because the order is arithmetic and samples are found by their numbers. A
generation of another world size makes a new stream; nothing is carried over but the step. At most `prefetch` steps are
loaded ahead. An error while loading is raised by the `next` of the step that it belongs to.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from time import perf_counter
from types import TracebackType

from elastictrain.data.order import MicroBatch, SampleOrder
from elastictrain.data.samples import Samples
from elastictrain.plan.layout import Layout
from elastictrain.workloads.base import Batch

Step = list[tuple[MicroBatch, Batch]]
"""One rank's part of a step: each micro-batch with its samples."""


class SampleStream(Iterator[Step]):
    """Endless iterator over rank `rank`'s part of steps first_step, first_step + 1, ...; close it when done."""

    def __init__(
        self, samples: Samples, order: SampleOrder, layout: Layout, rank: int, first_step: int, prefetch: int = 2
    ) -> None:
        self._samples, self._order, self._layout, self._rank = samples, order, layout, rank
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"sample-stream-{rank}")
        self._next_step = first_step
        self._loading: deque[Future[Step]] = deque()
        self.last_wait_s = 0.0
        """How long the latest `next` waited for its step."""
        for _ in range(prefetch):
            self._load_one_more()

    def __next__(self) -> Step:
        if not self._loading:
            raise StopIteration
        begun = perf_counter()
        step = self._loading.popleft().result()
        self.last_wait_s = perf_counter() - begun
        self._load_one_more()
        return step

    def close(self) -> None:
        """End the thread, and with it the iteration; safe to call twice."""
        self._loading.clear()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> SampleStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _load_one_more(self) -> None:
        self._loading.append(self._thread.submit(self._load, self._next_step))
        self._next_step += 1

    def _load(self, step: int) -> Step:
        micro_batches = self._order.micro_batches(step, self._layout, self._rank)
        return [(micro_batch, self._samples.read(micro_batch.samples)) for micro_batch in micro_batches]
