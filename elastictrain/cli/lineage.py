"""`elastictrain lineage`: how a run came to where it is: attempts, generations, checkpoints and resumes, as a tree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import typer

from elastictrain.cli.completion import run_names
from elastictrain.cli.runs import find_run
from elastictrain.errors import DataError
from elastictrain.tracking.wording import count_text, seconds_text

Tree = tuple[str, Sequence["Tree"]]
"""A line, and what hangs from it."""


def lineage(
    run: Annotated[
        str, typer.Argument(metavar="RUN", autocompletion=run_names, help="Name of the run.", show_default=False)
    ],
    storage: Annotated[str, typer.Option(metavar="DIR", help="Folder or URI that holds the runs.")] = "runs/",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; docs/tracking.md describes it.")] = False,
) -> None:
    """Draw what a run's checkpoints came from.

    Its attempts, the generations of each, the checkpoints of those, and what each resume went on from.
    """
    from elastictrain.tracking.ancestry import ancestry
    from elastictrain.tracking.exact_json import dumps

    stored = find_run(storage, run)
    try:
        told = ancestry(stored.events())
    except ValueError as error:
        raise DataError(f"run {run} in {stored.storage.uri} has no lineage yet: {error}") from None
    if as_json:
        typer.echo(dumps(told, indent=2))
        return
    typer.echo("\n".join(draw(_run(told, running=stored.driven(stored.status())))))


def draw(tree: Tree) -> Iterator[str]:
    """The tree as lines of text."""
    line, branches = tree
    yield line
    for number, branch in enumerate(branches, start=1):
        last = number == len(branches)
        for depth, below in enumerate(draw(branch)):
            lead = ("└─ " if last else "├─ ") if depth == 0 else ("   " if last else "│  ")
            yield lead + below


def _run(told: dict[str, Any], running: bool) -> Tree:
    *earlier, last = told["attempts"]
    branches = [_attempt(attempt, "no end on record") for attempt in earlier]
    return f"run {told['run']}", [*branches, _attempt(last, "running" if running else "no end on record")]


def _attempt(attempt: dict[str, Any], unended: str) -> Tree:
    lasted = seconds_text(attempt["ended_s"] - attempt["started_s"])
    ending = attempt["status"] or unended
    line = f"attempt {attempt['attempt']}  {ending}, {lasted}"
    return line, [_generation(generation) for generation in attempt["generations"]]


def _generation(generation: dict[str, Any]) -> Tree:
    first, last = generation["first_step"], generation["last_step"]
    steps = f"steps {first} to {last}" if last else "no step"
    if last and generation["standing_steps"] < last - first + 1:
        steps += f", {count_text(generation['standing_steps'], 'step')} of them stand"
    begun = {"fresh": "from the beginning", "memory": "from memory", "durable": f"from checkpoint {first - 1}"}
    state = begun[generation["source"]]
    if generation["origin"]:
        state += f" of {generation['origin'].split('/')[-3]}"
    if generation["source"] != "fresh":
        state += f", {generation['continuation']}"
    workers = count_text(generation["world_size"], "worker")
    line = f"generation {generation['index']}  {generation['cause']}: {workers}, {steps}, {state}"
    return line, [(_checkpoint(checkpoint), ()) for checkpoint in generation["checkpoints"]]


def _checkpoint(checkpoint: dict[str, Any]) -> str:
    marks = [name for name in ("best", "last", "removed") if checkpoint[name]]
    if checkpoint["rejected"]:
        marks.append(f"refused: {checkpoint['rejected']}")
    loss = "" if checkpoint["loss"] is None else f"  loss {checkpoint['loss']:.4f}"
    bits = "" if checkpoint["bits_per_byte"] is None else f"  {checkpoint['bits_per_byte']:.3f} bits per byte"
    told = f"  ({', '.join(marks)})" if marks else ""
    return f"checkpoint {checkpoint['step']}  {checkpoint['sha256'][:12]}{loss}{bits}{told}"
