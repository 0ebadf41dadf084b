"""`elastictrain top`: a run as it goes on, redrawn every second, from what `status` and `report` read.

It reads the run's files and asks nobody, so it costs the run nothing and may be left open: what it holds of the events
does not grow with the run's steps.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Annotated

import typer

from elastictrain.cli.completion import run_names
from elastictrain.cli.runs import StoredRun, find_run, newest_run
from elastictrain.errors import DataError
from elastictrain.sentences import Narrator
from elastictrain.status import Status
from elastictrain.tracking.wording import seconds_text

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

    from elastictrain.events import Event, RanksTimed
    from elastictrain.tracking.ledger import Goodput

REDRAW_S = 1.0
FETCH_S = 10.0
"""Between two looks at the journal of a run in an object store: each fetches all of it."""
NUM_RECENT = 6
NUM_RANKS = 8
BAR_WIDTH = 60

COLOURS = {
    "compute": "green",
    "communication": "bright_green",
    "data_wait": "yellow",
    "snapshot_stall": "bright_yellow",
    "checkpoint_stall": "dark_orange",
    "lost": "red",
    "detection": "bright_red",
    "recovery": "magenta",
    "resize": "bright_magenta",
    "startup": "blue",
    "evaluation": "cyan",
    "shutdown": "bright_blue",
    "idle": "bright_black",
    "down": "white",
    "spare": "grey50",
}
"""Of the ledger's buckets, in the order of the bar."""


def top(
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN", autocompletion=run_names, help="Name of the run; without it, the newest.", show_default=False
        ),
    ] = None,
    storage: Annotated[str, typer.Option(metavar="DIR", help="Folder or URI that holds the runs.")] = "runs/",
) -> None:
    """Watch a run.

    Its state, where its time goes, its ranks and what happened last, redrawn every second until it ends; Ctrl-C leaves
    it alone. Prints once where the output is no terminal.
    """
    from rich.console import Console
    from rich.live import Live

    view = View(find_run(storage, run) if run else newest_run(storage))
    console = Console()
    if console.is_terminal and not console.is_dumb_terminal:
        try:
            with Live(view.draw(), console=console, screen=True, auto_refresh=False) as live:
                while not view.status.ended:
                    time.sleep(REDRAW_S)
                    live.update(view.draw(), refresh=True)
        except KeyboardInterrupt:
            return
    console.print(view.draw())


class View:
    """What is known of a run, and how it looks."""

    def __init__(self, run: StoredRun) -> None:
        self._run = run
        from elastictrain.tracking.metrics import Latest
        from elastictrain.tracking.running_ledger import RunningLedger

        self._position: object = None
        self._num_read = 0
        self._narrator, self._recent = Narrator(), list[str]()
        self._latest, self._ledger = Latest(), RunningLedger(run.history)
        self._look_at = 0.0
        self.status = Status.beginning(run.name, time.time())

    def draw(self) -> RenderableType:
        """The state now, with the ledger, the ranks and the last events."""
        from rich.console import Group
        from rich.text import Text

        from elastictrain.progress import status_table
        from elastictrain.tracking.cost import cost_of

        self.status = self._run.status() or self.status
        self._read()
        parts: list[RenderableType] = [status_table(self.status, tuple(self._recent))]
        ledger = self._ledger.goodput(None if self.status.ended else time.time())
        if ledger.wall_s:
            parts += [Text(), ledger_bar(ledger)]
        if (cost := cost_of(self._latest.price, ledger)) is not None:
            parts.append(Text(f"cost {cost:.4g}"))
        if ranks := list(rank_bars(self._latest.timed, self.status.generation)):
            parts += [Text(), *ranks]
        age_s = max(0.0, time.time() - self.status.updated_at)
        parts += [Text(), Text(f"written {seconds_text(age_s)} ago, attempt {self.status.attempt}", style="dim")]
        return Group(*parts)

    def _read(self) -> None:
        """Take in what the journal has more."""
        if time.monotonic() < self._look_at:
            return
        for event in self._new_events():
            self._num_read += 1
            self._latest.add(event)
            self._ledger.add(event)
            if told := self._narrator.tell(event):
                self._recent = [*self._recent, told][-NUM_RECENT:]

    def _new_events(self) -> Iterator[Event]:
        from elastictrain.tracking.journal import Position, follow

        local = self._run.storage.local
        if local is None:
            self._look_at = time.monotonic() + FETCH_S
            yield from islice(self._run.history(), self._num_read, None)
            return
        start = self._position if isinstance(self._position, Position) else Position()
        try:
            for event, position in follow(local, start):
                self._position = position
                yield event
        except FileNotFoundError:
            raise DataError(f"run {self._run.name} is gone from {self._run.storage.uri}") from None


def ledger_bar(ledger: Goodput) -> Text:
    """Where the time went: a bar, and its colours in words."""
    from rich.text import Text

    bar, words = Text("time        "), Text("            ")
    drawn, passed = 0, 0.0
    for bucket, colour in COLOURS.items():
        seconds = ledger.seconds[bucket]
        passed += seconds
        width = round(passed / ledger.wall_s * BAR_WIDTH) - drawn
        drawn += width
        bar.append("█" * width, style=colour)
        if seconds >= 0.005 * ledger.wall_s:
            words.append("■", style=colour)
            told = f" {bucket.replace('_', ' ')} {seconds_text(seconds)}"
            words.append(told.replace(" ", "\N{NO-BREAK SPACE}") + "  ")  # a line breaks between buckets
    return bar.append("\n").append_text(words)


def rank_bars(timed: RanksTimed | None, generation: int) -> Iterator[Text]:
    """The slowest ranks of the generation by their own work, while there is more than one to compare."""
    from rich.text import Text

    if timed is None or timed.generation != generation or len(timed.own_s) < 2:
        return
    slowest = sorted(range(len(timed.own_s)), key=lambda rank: -timed.own_s[rank])[:NUM_RANKS]
    most = timed.own_s[slowest[0]] or 1.0
    for rank in sorted(slowest):
        width = max(round(timed.own_s[rank] / most * BAR_WIDTH / 2), 1)
        line = Text(f"rank {rank:<7}").append("▇" * width, style="green")
        yield line.append(f"  {seconds_text(timed.own_s[rank])} of own work a step", style="dim")
