"""What people see while a run trains: a live table on a terminal, plain lines in a file or a pipe.

Both are listeners that the trainer calls after each event and each change of the live state. They only show: a
terminal that went away silences them and never stops training. The table is redrawn four times a second by its own
thread; a call costs microseconds.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Protocol, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from elastictrain.events import Event
from elastictrain.sentences import Narrator, percent, status_line
from elastictrain.status import RunState, Status
from elastictrain.tracking.wording import count_text, seconds_text

NUM_RECENT = 6
"""Events that the table shows."""

NUM_WORKERS_SHOWN = 8
"""Workers that the table names; more are counted."""

_STYLES: dict[RunState, str] = {
    "running": "green",
    "complete": "bold green",
    "recovering": "bold yellow",
    "waiting": "yellow",
    "failed": "bold red",
}


class ProgressListener(Protocol):
    """Hears what happens in a run. Calls come from one thread, in order."""

    def on_event(self, event: Event) -> None:
        """Something happened."""
        ...

    def on_status(self, status: Status) -> None:
        """The live state changed."""
        ...

    def close(self) -> None:
        """Nothing more will come; may be called twice."""
        ...


def progress_on(stream: TextIO) -> ProgressListener:
    """The listener that suits this stream: a table where it is a terminal that can redraw, else lines."""
    console = Console(file=stream)
    if stream.isatty() and not console.is_dumb_terminal:
        return LiveTable(console)
    return PlainLines(stream)


class PlainLines:
    """One line for each notable event, and one for the state when it changed, at most every `every_s`.

    A message that stays is told once.
    """

    def __init__(self, stream: TextIO, every_s: float = 5.0) -> None:
        self._stream: TextIO | None = stream
        self._every_s = every_s
        self._narrator = Narrator()
        self._last: Status | None = None
        self._told = ""

    def on_event(self, event: Event) -> None:
        """Write the event's sentence."""
        sentence = self._narrator.tell(event)
        if sentence is not None:
            self._told = sentence
            self._write(sentence)

    def on_status(self, status: Status) -> None:
        """Write the state's line when it is due."""
        last = self._last
        if last is not None and last.status == status.status:
            # goodput changes while nothing happens
            nothing_new = status_line(replace(status, goodput=last.goodput)) == status_line(last)
            if nothing_new or status.updated_at - last.updated_at < self._every_s:
                return
        self._last = status
        known = (last is not None and last.message == status.message) or status.message in self._told
        self._write(status_line(replace(status, message="") if known else status))

    def close(self) -> None:
        """Nothing to undo: every line is flushed as it is written."""

    def _write(self, line: str) -> None:
        if self._stream is None:
            return
        try:
            print(line, file=self._stream, flush=True)
        except OSError:  # the reader closed the pipe, or its disk is full: training matters more
            self._stream = None


class LiveTable:
    """The state as a table that is redrawn in place, with the last few events under it."""

    def __init__(self, console: Console) -> None:
        self._narrator = Narrator()
        self._status: Status | None = None
        self._recent: tuple[str, ...] = ()
        self._live = Live(console=console, get_renderable=self._draw, refresh_per_second=4, auto_refresh=True)

    def on_event(self, event: Event) -> None:
        """Add the event's sentence under the table."""
        sentence = self._narrator.tell(event)
        if sentence is not None:
            self._recent = (*self._recent, sentence)[-NUM_RECENT:]
            self._live.start()

    def on_status(self, status: Status) -> None:
        """Show this state from the next redraw on."""
        self._status = status
        self._live.start()

    def close(self) -> None:
        """Draw the last state once more and give the terminal back."""
        with contextlib.suppress(OSError):  # the terminal may be gone
            self._live.stop()

    def _draw(self) -> RenderableType:
        return status_table(self._status, self._recent)


def status_table(status: Status | None, recent: tuple[str, ...] = ()) -> RenderableType:
    """The state as a panel of figures, its workers, and recent events in words."""
    events = Text("\n".join(recent), style="dim")
    if status is None:
        return Panel(events, title="elastictrain", title_align="left")
    bar = Table.grid(padding=(0, 2))
    bar.add_row(
        Text(f"step {status.step}/{status.steps}"), ProgressBar(total=status.steps, completed=status.step, width=44)
    )
    figures = Table.grid(padding=(0, 2))
    for style in ("dim", "", "dim", ""):
        figures.add_column(style=style, no_wrap=True, min_width=10)
    recovery = "none" if status.last_recovery_s is None else seconds_text(status.last_recovery_s)
    loss = "" if status.loss is None else f"{status.loss:.4f}"
    figures.add_row("state", Text(status.status, style=_STYLES.get(status.status, "")), "loss", loss)
    figures.add_row("world size", str(status.world_size), "tokens/s", f"{status.tokens_per_s:,.0f}")
    figures.add_row("layout", status.layout, "goodput", percent(status.goodput))
    figures.add_row("lost steps", str(status.lost_steps), "recovery", recovery)
    lines = worker_lines(status) + ([status.message] if status.message else [])
    body = Group(bar, Text(), figures, Text(), *map(Text, lines), Text(), events)
    return Panel(body, title=f"elastictrain  {status.run}", title_align="left")


def worker_lines(status: Status) -> list[str]:
    """One line for each rank and each spare, as many as fit; the rest counted."""
    lines = [f"rank {w.rank}  {w.state}  step {w.step}  {w.worker}  pid {w.pid}  node {w.node}" for w in status.workers]
    lines += [f"standby  {s.worker}  pid {s.pid}  node {s.node}" for s in status.standbys]
    hidden = len(lines) - NUM_WORKERS_SHOWN
    return [*lines[:NUM_WORKERS_SHOWN], f"and {count_text(hidden, 'more worker')}"] if hidden > 0 else lines
