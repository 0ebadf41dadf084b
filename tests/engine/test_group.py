"""Peers that die or fall silent, and what the survivors do in the same processes. About 20 s together."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from dataclasses import dataclass

import psutil
import pytest
import torch
import torch.distributed as dist
from ranks import PATIENCE_S, Rank, Team, run_team, team
from training import NUM_MICRO_BATCHES, train, train_config, workload

from elastictrain.engine.build import build_engine
from elastictrain.engine.group import RankGroup, Rendezvous
from elastictrain.engine.sockets import listeners
from elastictrain.errors import PeerLostError

VICTIM = 1
FAR_BELOW_THE_TIMEOUT_S = 20.0
"""An abort takes milliseconds; without it a rank waits for the group's 600 s."""


@dataclass
class Survival:
    raised: str
    """Type of what the broken step raised."""
    took_s: float
    """From the abort to there; negative when it raised before."""
    losses: dict[tuple[int, int], float]
    """Of the first step of the next generation."""
    bystander: bytes
    """What a connection that is none of the group's carried afterwards."""


def survive(me: Rank, stage: int, deadly: int, when: str, pp: int = 1) -> Survival:
    """Three ranks; the victim sends itself `deadly` in a phase, or instead of a build; the others go on without it.

    With two stages four ranks begin, and two go on as one replica.
    """
    config = train_config(stage, degrees={"pp": pp} if pp > 1 else None)
    world_size = 3 if pp == 1 else 4
    ours, theirs = connected_pair()
    group = me.group(0, range(world_size), timeout_s=PATIENCE_S)
    group.form()
    late_ours, late_theirs = connected_pair()
    aborted_at = 0.0

    def abort_when_told() -> None:
        nonlocal aborted_at
        assert me.hear() == "abort"
        aborted_at = time.monotonic()
        group.abort()

    def strike(phase: str) -> None:
        if me.index == VICTIM and phase == when:
            os.kill(os.getpid(), deadly)

    listener = threading.Thread(target=abort_when_told, daemon=True)
    listener.start()
    me.say(os.getpid())
    engine = None
    try:
        strike("build")
        engine = build_engine(workload(config), config, config.layout(world_size), group)
        train(engine, config, me.index, world_size, [1], on_phase=strike)
        raise AssertionError("the step came through")
    except PeerLostError as error:
        raised_at, raised = time.monotonic(), type(error).__name__
        me.say("raised")
    listener.join()
    if engine is not None:
        engine.close()
    group.close()
    survivors = (0, 2)
    if me.index not in survivors:
        return Survival(raised, raised_at - aborted_at, {}, b"still here")
    left, group = group, me.group(1, survivors)
    group.form()
    left.abort()  # comes late, and must not touch the next group
    engine = build_engine(workload(config), config, config.layout(2), group)
    losses = train(engine, config, survivors.index(me.index), 2, [1])
    engine.close()
    group.close()
    ours.sendall(b"still ")
    late_ours.sendall(b"here")
    return Survival(raised, raised_at - aborted_at, losses, theirs.recv(6) + late_theirs.recv(4))


def connected_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        return client, server.accept()[0]


def tell_survivors(members: Team) -> list[Survival]:
    survivors = [rank for rank in range(len(members.processes)) if rank != VICTIM]
    for rank in survivors:
        members.tell(rank, "abort")
    for rank in survivors:
        assert members.said(rank) == "raised"
    return [members.result(rank) for rank in survivors]


def went_on(results: list[Survival]) -> None:
    for result in results:
        assert result.raised == "PeerLostError"
        assert result.bystander == b"still here"
    assert {key for result in results for key in result.losses if key[1] >= 0} == {
        (1, index) for index in range(NUM_MICRO_BATCHES)
    }


@pytest.mark.parametrize(("stage", "when"), [(1, "backward"), (3, "forward"), (3, "build"), (2, "update")])
def test_abort_frees_ranks_that_wait_for_a_silent_one(stage: int, when: str) -> None:
    with team(3, survive, stage, signal.SIGSTOP, when) as members:
        pids = [members.said(rank) for rank in range(3)]
        wait_until_stopped(pids[VICTIM])
        results = tell_survivors(members)
    went_on(results)
    assert max(result.took_s for result in results) < FAR_BELOW_THE_TIMEOUT_S


@pytest.mark.parametrize(("stage", "when"), [(0, "backward"), (2, "build"), (3, "backward")])
def test_survivors_of_a_killed_rank_form_a_group_and_train(stage: int, when: str) -> None:
    with team(3, survive, stage, signal.SIGKILL, when) as members:
        for rank in range(3):
            members.said(rank)
        members.processes[VICTIM].join()
        results = tell_survivors(members)
    went_on(results)


@pytest.mark.parametrize(
    ("deadly", "when"), [(signal.SIGKILL, "forward"), (signal.SIGSTOP, "backward"), (signal.SIGSTOP, "build")]
)
def test_the_ranks_of_a_broken_pipeline_go_on_as_a_smaller_one(deadly: int, when: str) -> None:
    with team(4, survive, 1, deadly, when, 2) as members:
        pids = [members.said(rank) for rank in range(4)]
        if deadly == signal.SIGSTOP:
            wait_until_stopped(pids[VICTIM])
        else:
            members.processes[VICTIM].join()
        results = tell_survivors(members)
    went_on(results)
    assert max(result.took_s for result in results) < FAR_BELOW_THE_TIMEOUT_S


def wait_until_stopped(pid: int) -> None:
    process = psutil.Process(pid)
    deadline = time.monotonic() + PATIENCE_S
    while process.status() != psutil.STATUS_STOPPED:
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ---------------------------------------------------------------------------------------------------------- forming


def form_with_a_missing_rank(me: Rank) -> float:
    """Rank 1 never comes; rank 0 is told to give up."""
    if me.index == 1:
        return 0.0
    group = me.group(0, (0, 1), form_timeout_s=PATIENCE_S)
    threading.Thread(target=lambda: (me.hear(), group.abort()), daemon=True).start()
    me.say("forming")
    try:
        group.form()
    except PeerLostError:
        group.close()
        return time.monotonic()
    raise AssertionError("formed without rank 1")


def test_abort_ends_the_wait_for_a_rank_that_never_comes() -> None:
    with team(2, form_with_a_missing_rank) as members:
        assert members.said(0) == "forming"
        told_at = time.monotonic()
        members.tell(0, "abort")
        assert members.result(0) - told_at < 5.0


def hear_news(me: Rank) -> dict[int, str]:
    """Rank 0 announces before a collective, as fast or slow as it comes there; all ask after it."""
    group = me.group(0, (0, 1, 2))
    group.form()
    heard = {}
    for step in range(60):
        if me.index == 0:
            time.sleep(0.002 * (step % 3))
            if step % 2:
                group.announce(step, f"news of {step}")
        dist.all_reduce(torch.ones(1))
        time.sleep(0.002 * (me.index * step % 4))
        heard[step] = group.news(step)
    group.close()
    return heard


def test_all_ranks_hear_news_after_the_same_step() -> None:
    assert run_team(3, hear_news) == [{step: f"news of {step}" if step % 2 else "" for step in range(60)}] * 3


def test_a_dead_rendezvous_is_told_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(PeerLostError, match="refused"):
        RankGroup(f"127.0.0.1:{port}", 0, 0, 1).form()


def test_a_rendezvous_listens_on_its_address_alone() -> None:
    rendezvous = Rendezvous.serve("127.0.0.1")
    port = int(rendezvous.address.rpartition(":")[2])
    addresses = {
        c.laddr.ip for c in psutil.Process().net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == port
    }
    assert addresses == {"127.0.0.1"}


def listen_where(me: Rank) -> tuple[set[str], str | None]:
    """Addresses that the group listens on, and what remains of the choice."""
    before = listeners()
    group = me.group(0, (0, 1))
    group.form()
    during = {address for address, _ in listeners() - before}
    me.meet()
    group.close()
    return during, os.environ.get("GLOO_SOCKET_IFNAME")


def test_a_group_on_one_machine_stays_on_its_loopback() -> None:
    assert run_team(2, listen_where) == [({"127.0.0.1"}, None)] * 2
