"""`elastictrain top`: a run as it goes on, redrawn every second, from what `status` and `report` read.

It reads the run's files and asks nobody, so it costs the run nothing and may be left open. The ledger is folded again
so seldom that it takes a tenth of a core at most, however long the run is.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
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

    from elastictrain.events import Event
    from elastictrain.tracking.ledger import Goodput

REDRAW_S = 1.0
FETCH_S = 10.0
"""Between two looks at the journal of a run in an object store: each fetches all of it."""
LEDGER_SHARE = 0.1
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
        self._events: list[Event] = []
        self._position: object = None
        self._narrator, self._recent = Narrator(), list[str]()
        self._ledger: Goodput | None = None
        self._look_at = self._fold_at = 0.0
        self.status = Status.beginning(run.name, time.time())

    def draw(self) -> RenderableType:
        """The state now, with the ledger, the ranks and the last events."""
        from rich.console import Group
        from rich.text import Text

        from elastictrain.progress import status_table

        self.status = self._run.status() or self.status
        self._read()
        parts: list[RenderableType] = [status_table(self.status, tuple(self._recent))]
        if self._ledger is not None and self._ledger.wall_s:
            parts += [Text(), ledger_bar(self._ledger)]
        if ranks := list(rank_bars(self._events, self.status.generation)):
            parts += [Text(), *ranks]
        age_s = max(0.0, time.time() - self.status.updated_at)
        parts += [Text(), Text(f"written {seconds_text(age_s)} ago, attempt {self.status.attempt}", style="dim")]
        return Group(*parts)

    def _read(self) -> None:
        """Take in what the journal has more, and fold the ledger anew when it is time."""
        from elastictrain.tracking.ledger import goodput

        now = time.monotonic()
        if now >= self._look_at:
            new = self._new_events()
            self._events += new
            told = filter(None, map(self._narrator.tell, new))
            self._recent = [*self._recent, *told][-NUM_RECENT:]
        if now >= self._fold_at and self._events:
            self._ledger = goodput(self._events, None if self.status.ended else time.time())
            done = time.monotonic()
            self._fold_at = done + (done - now) / LEDGER_SHARE

    def _new_events(self) -> list[Event]:
        from elastictrain.tracking.journal import Position, tail

        local = self._run.storage.local
        if local is None:
            self._look_at = time.monotonic() + FETCH_S
            return self._run.events()[len(self._events) :]
        start = self._position if isinstance(self._position, Position) else Position()
        try:
            new, self._position = tail(local, start)
        except FileNotFoundError:
            raise DataError(f"run {self._run.name} is gone from {self._run.storage.uri}") from None
        return new


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


def rank_bars(events: Sequence[Event], generation: int) -> Iterator[Text]:
    """The slowest ranks of the generation by their own work, while there is more than one to compare."""
    from rich.text import Text

    from elastictrain.events import RanksTimed

    timed = next((e for e in reversed(events) if isinstance(e, RanksTimed)), None)
    if timed is None or timed.generation != generation or len(timed.own_s) < 2:
        return
    slowest = sorted(range(len(timed.own_s)), key=lambda rank: -timed.own_s[rank])[:NUM_RANKS]
    most = timed.own_s[slowest[0]] or 1.0
    for rank in sorted(slowest):
        width = max(round(timed.own_s[rank] / most * BAR_WIDTH / 2), 1)
        line = Text(f"rank {rank:<7}").append("▇" * width, style="green")
        yield line.append(f"  {seconds_text(timed.own_s[rank])} of own work a step", style="dim")
