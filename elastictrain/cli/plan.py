"""`elastictrain plan`: which layout suits a run, how much memory and time it takes, and why."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from elastictrain.config import TrainConfig
    from elastictrain.plan.auto import Plan
    from elastictrain.plan.choose import Job, Option, Ranking
    from elastictrain.plan.cluster import Cluster

NUM_SHOWN = 8
NUM_SIZES = 16
"""Numbers of workers that are looked at, the largest ones."""


def plan(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="YAML file that describes the run.", show_default=False)
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Fields to change, such as train.dtype=bf16.", show_default=False),
    ] = None,
    cluster: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Cluster file; without it, this machine.", show_default=False),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Workers; without it, as many as can share a step on the cluster's devices, or elastic.max_workers.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Find the layout for a run.

    Memory and step time of every legal layout, the best and why, and the numbers of workers that a run can go on with.
    Nothing is started, no data is read.
    """
    from elastictrain.config import TrainConfig
    from elastictrain.errors import ConfigError
    from elastictrain.machines import read_cluster, this_machine
    from elastictrain.plan.choose import NothingFits, rank_layouts, weigh
    from elastictrain.plan.layout import legal_world_sizes
    from elastictrain.plan.space import Candidate, everything
    from elastictrain.planning import job_of, overrides_of

    resolved = TrainConfig.load(config, overrides or [])
    job = job_of(resolved)
    found = read_cluster(cluster) if cluster else this_machine(resolved.elastic.max_workers)
    room = found.num_devices if cluster else resolved.elastic.max_workers
    world_size = workers or legal_world_sizes(job.global_batch, 1, 1, room)[-1]
    if cluster and world_size > room:
        raise ConfigError(
            f"--workers {world_size}: {cluster} has {room} devices; ask for at most that, or add num_nodes"
        )
    all_choices = everything(job.shape, world_size, found.devices_per_node, found.nvme_bytes_per_s > 0)
    begun = time.process_time()
    wider = rank_layouts(job, found, world_size, all_choices)
    searched_s = time.process_time() - begun
    try:
        ranking = rank_layouts(job, found, world_size, drive=resolved.parallel.offload_path is not None)
    except NothingFits as error:
        runs = wider.best_run_by(job)
        how = ": " + " ".join(overrides_of(runs.candidate)) if runs else ", but no engine runs that yet"
        raise NothingFits(f"{error} {(runs or wider.best).candidate} would fit{how}.") from None
    plan, most = _plan_of(resolved, job, found), resolved.elastic.max_workers
    as_written = None
    if world_size == most:
        layout = plan[most].layout if most in plan else resolved.layout(most)
        as_written = weigh(job, Candidate.of(layout), found)
    sizes = _sizes_of(resolved, job, found, plan, world_size)
    if as_json:
        typer.echo(json.dumps(_as_json(job, found, ranking, wider, as_written, plan, sizes), indent=2))
    else:
        _show(job, found, ranking, wider, as_written, plan, sizes)
        typer.echo(f"looked   at {wider.num_looked_at:,} layouts, {searched_s:.2f} s of a processor")


def _plan_of(config: TrainConfig, job: Job, cluster: Cluster) -> Plan:
    """What the run would train with at each number of workers; empty where nothing fits."""
    from elastictrain.plan.choose import NothingFits
    from elastictrain.plan.figures import Figures
    from elastictrain.planning import plans_of

    with suppress(NothingFits):
        return plans_of(config, Figures(cluster, known=True, firm=True), job.shape.vocab_size)[0]
    return {}


def _sizes_of(config: TrainConfig, job: Job, cluster: Cluster, plan: Plan, world_size: int) -> dict[int, Option | None]:
    """What the run would train with at each number of workers up to this one; None where nothing fits."""
    from elastictrain.plan.choose import weigh, world_sizes
    from elastictrain.plan.layout import legal_world_sizes
    from elastictrain.plan.space import Candidate
    from elastictrain.planning import asked_of

    low, asked = config.elastic.min_workers, asked_of(config)
    if config.parallel.layout == "manual":
        legal = asked.world_sizes(low, max(world_size, config.elastic.max_workers))[-NUM_SIZES:]
        weighed = {n: weigh(job, Candidate.of(asked.layout(n)), cluster) for n in legal}
        return {n: option if option.fits(job, cluster) else None for n, option in weighed.items()}
    legal = legal_world_sizes(job.global_batch, 1, low, min(world_size, job.global_batch))[-NUM_SIZES:]
    found = world_sizes(job, cluster, legal, asked.drive)
    planned = {n: weigh(job, Candidate.of(choice.layout), cluster) for n, choice in plan.items()}
    return dict(sorted((found | planned).items()))


def _as_json(
    job: Job,
    cluster: Cluster,
    ranking: Ranking,
    wider: Ranking,
    as_written: Option | None,
    plan: Plan,
    sizes: dict[int, Option | None],
) -> dict[str, Any]:
    from elastictrain.plan.choose import advise, why
    from elastictrain.plan.cluster import TIME_ERROR
    from elastictrain.planning import overrides_of

    best, others, asked = ranking.best, ranking.best_of_each_kind()[1:], wider.best_run_by(job)
    advised = advise(job, ranking, as_written, cluster)
    return {
        "version": 1,
        "time_error": TIME_ERROR,
        "advised": advised.to_json() | {"overrides": overrides_of(advised.candidate), "keep": advised is as_written},
        "cluster": cluster.model_dump(mode="json"),
        "parameters": {"all": job.shape.num_parameters, **job.shape.by_part()},
        "flops_per_token": job.shape.flops_per_token(),
        "best": best.to_json() | {"overrides": overrides_of(best.candidate)},
        "others": [option.to_json() | {"why_not": why(best, option)} for option in others],
        "as_written": as_written.to_json() if as_written else None,
        "runs": {str(n): choice.to_json() for n, choice in plan.items()},
        "best_of_all": wider.best.to_json(),
        "best_to_ask_for": asked and asked.to_json() | {"overrides": overrides_of(asked.candidate)},
        "num_looked_at": wider.num_looked_at,
        "world_sizes": {str(n): option and option.to_json() for n, option in sizes.items()},
    }


def _show(
    job: Job,
    cluster: Cluster,
    ranking: Ranking,
    wider: Ranking,
    as_written: Option | None,
    plan: Plan,
    sizes: dict[int, Option | None],
) -> None:
    from rich.console import Console
    from rich.table import Table

    from elastictrain.plan.choose import advise, why
    from elastictrain.plan.cluster import TIME_ERROR
    from elastictrain.planning import overrides_of
    from elastictrain.tracking.wording import bytes_text, seconds_text

    best, console = ranking.best, Console()
    size = bytes_text(cluster.device.memory_bytes)
    typer.echo(
        f"{job.shape.num_parameters:,} parameters, {job.shape.flops_per_token():.3g} FLOPs a token; {cluster.name}: "
        f"{cluster.num_devices} x {cluster.device.name}, {size}\n"
    )
    table = Table(box=None, pad_edge=False)
    for name in ("layout", "memory", "step", "tokens/s", "of peak", "why not"):
        table.add_column(name, justify="left" if name in ("layout", "why not") else "right")
    advised = advise(job, ranking, as_written, cluster)
    shown = {option.candidate: option for option in (*ranking.best_of_each_kind()[:NUM_SHOWN], advised)}
    for option in sorted(shown.values(), key=lambda option: option.time.step_s):
        table.add_row(
            str(option.candidate),
            bytes_text(option.memory.device_bytes),
            seconds_text(option.time.step_s),
            f"{option.tokens_per_s(job):,.0f}",
            f"{100 * option.utilisation(job, cluster):.0f} %",
            "" if option.candidate == best.candidate else why(best, option),
        )
    console.print(table)
    error = f"{100 * TIME_ERROR:.0f} %"
    if advised is as_written:
        faster = best.time.step_s / advised.time.step_s
        typer.echo(
            f"\nkeep     {advised.candidate}, as the config has it: nothing is known to be faster"
            + (f" ({best.candidate}: by {100 * (1 - faster):.2g} %, within the error of {error})" if faster < 1 else "")
        )
    else:
        typer.echo(f"\nbest     {best.candidate}: elastictrain train CONFIG {' '.join(overrides_of(best.candidate))}")
    typer.echo(f"time     {_time_parts(advised)}")
    typer.echo(f"memory   {_parts(advised)}, at its worst in the {advised.memory.moment}")
    if as_written and advised is not as_written:
        needs = bytes_text(as_written.memory.device_bytes)
        verdict = why(best, as_written) if as_written.fits(job, cluster) else f"does not fit: it needs {needs}"
        typer.echo(f"written  {as_written.candidate}, as the config has it: {verdict}")
    equals = sum(option.as_fast_as(best) for option in ranking.best_of_each_kind()) - 1
    if equals:
        typer.echo(f"error    times are predicted to {error}: {equals} others may be as fast as {best.candidate}")
    asked = wider.best_run_by(job)
    if asked and not best.as_fast_as(asked):
        how = " ".join(overrides_of(asked.candidate))
        typer.echo(f"asked    {_times_as_fast(asked, best)}, and has to be asked for: {how}")
    if not (asked or best).as_fast_as(wider.best):
        typer.echo(f"later    {_times_as_fast(wider.best, best)}; no engine runs it yet")
    if plan:
        told = [f"{choice.layout} with {n}" for n, choice in plan.items()]
        typer.echo(f"{'runs':8} {'; '.join(told[-NUM_SHOWN:])}")
    typer.echo(f"workers  {_sizes(sizes)}")


def _times_as_fast(option: Option, best: Option) -> str:
    return f"{option.candidate} would be {best.time.step_s / option.time.step_s:.2g} times as fast"


def _time_parts(option: Option) -> str:
    from elastictrain.tracking.wording import seconds_text

    parts = sorted(((seconds, name) for name, seconds in asdict(option.time).items() if seconds), reverse=True)
    return ", ".join(f"{name.replace('_', ' ')} {seconds_text(seconds)}" for seconds, name in parts)


def _parts(option: Option) -> str:
    from elastictrain.tracking.wording import bytes_text

    names = ("weights", "gradients", "optimizer", "activations", "buffers", "fragmentation", "reserved")
    parts = [(name, getattr(option.memory, name)) for name in names]
    return ", ".join(f"{name} {bytes_text(num_bytes)}" for name, num_bytes in parts if num_bytes)


def _sizes(sizes: dict[int, Option | None]) -> str:
    from elastictrain.tracking.wording import bytes_text

    memory = {n: option.memory for n, option in sizes.items() if option}
    fitting = [f"{n} ({bytes_text(needs.device_bytes)})" for n, needs in memory.items()]
    short = [str(n) for n, option in sizes.items() if option is None]
    told = f"the run can go on with {', '.join(fitting)}" if fitting else "the run can go on with no number"
    return told + (f"; too little memory with {', '.join(short)}" if short else "")
