"""Tables of HTML: those of a run that went on for weeks show how it began and how it goes (pure).

Cells are HTML already; a column whose head begins with > holds numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

MAX_ROWS, FIRST_ROWS = 200, 50
"""Of a table that grows with the run, and how many of them are its first."""

Row = Sequence[str]


def table(head: Row, rows: Iterable[Row]) -> str:
    """All rows."""
    return _framed(head, _lines(head, rows))


def long_table(head: Row, rows: Sequence[Row]) -> str:
    """The first and the last rows, if there are too many to read."""
    between = len(rows) - MAX_ROWS
    if between <= 0:
        return table(head, rows)
    words = f"{between:,} more between these; <code>elastictrain report --json</code> tells all"
    gap = f'<tr><td colspan="{len(head)}" class="quiet">{words}</td></tr>'
    return _framed(head, [*_lines(head, rows[:FIRST_ROWS]), gap, *_lines(head, rows[between + FIRST_ROWS :])])


def _framed(head: Row, lines: Iterable[str]) -> str:
    heads = "".join(f"<th{_class(name)}>{escape(name.lstrip('>'))}</th>" for name in head)
    many = " class=many" * (len(head) > 5)
    return f'<div class="scroll"><table{many}><tr>{heads}</tr>{"".join(lines)}</table></div>'


def _lines(head: Row, rows: Iterable[Row]) -> Iterable[str]:
    for row in rows:
        yield "<tr>" + "".join(f"<td{_class(name)}>{cell}</td>" for cell, name in zip(row, head)) + "</tr>"


def _class(name: str) -> str:
    return " class=number" if name.startswith(">") else ""
