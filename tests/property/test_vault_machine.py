"""Real vaults, three ranks on three nodes, each with a buddy, and deaths at any point: the promise of the protocol.

The machine plays SnapshotWriter's steps (export, commit, replicate, wait, collective) in every order that the
collective allows, and kills workers and a node between any two of them, half-done copies included.
"""

from __future__ import annotations

from collections.abc import Iterable

import hypothesis.strategies as st
import pytest
from hypothesis import event, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from elastictrain.checkpoint.arena import Arena
from elastictrain.checkpoint.checksum import checksum
from elastictrain.checkpoint.vault import Vault
from elastictrain.errors import StaleGenerationError
from elastictrain.state.tensors import Fragment, ShardHeader, ShardIndex

WORLD = 3
EVER = 1 << 30
ranks = st.integers(0, WORLD - 1)


def index_of(rank: int) -> ShardIndex:
    return ShardIndex((Fragment("param/w", rank * 8, 8),))


def content(rank: int, step: int) -> bytes:
    return bytes([rank, step % 256, step // 256, 7]) * 8


class Rank:
    """One rank's writer in one generation. `phase`: idle, exporting, exported, committed, held."""

    def __init__(self, vault: Vault, generation: int, rank: int) -> None:
        self.generation, self.rank = generation, rank
        self.arenas = [Arena.open(t) for t in vault.attach(generation, rank, WORLD, index_of(rank))]
        self.buffer = 0
        self.phase = "idle"

    def header(self, step: int) -> ShardHeader:
        return ShardHeader(self.generation, step, self.rank, WORLD, checksum(content(self.rank, step)), {})


class Promise(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.vaults = {
            node: Vault(f"node-{node}", lambda header: pytest.fail(f"damaged: {header}")) for node in range(WORLD)
        }
        self.generation = 0
        self.step = 0
        self.safe_step = 0
        self.zombies: list[tuple[Rank, int]] = []
        self.any_complete = False
        self.begin_generation()

    def begin_generation(self) -> None:
        self.generation += 1
        self.released = False
        self.ranks = [Rank(self.vaults[rank], self.generation, rank) for rank in range(WORLD)]

    def buddy(self, rank: int) -> Vault:
        return self.vaults[(rank + 1) % WORLD]

    @rule(rank=ranks, stages=st.integers(1, 4), breaks=st.booleans())
    def advance(self, rank: int, stages: int, breaks: bool) -> None:
        """One rank goes on for some stages; the buddy's connection may break the first time."""
        for _ in range(stages):
            match self.ranks[rank].phase:
                case "idle":
                    self.export_half(rank)
                case "exporting":
                    self.export_rest(rank)
                case "exported":
                    self.commit(rank)
                case "committed":
                    self.replicate(rank, breaks)
                    breaks = False

    @rule(stages=st.tuples(*[st.integers(2, 4)] * WORLD))
    def advance_all(self, stages: tuple[int, ...]) -> None:
        """The usual course, so that runs get far enough to lose something."""
        for rank, number in enumerate(stages):
            self.advance(rank, number, breaks=False)

    def export_half(self, rank: int) -> None:
        writer = self.ranks[rank]
        writer.arenas[writer.buffer].buffer[:13] = content(rank, self.step + 1)[:13]
        writer.phase = "exporting"

    def export_rest(self, rank: int) -> None:
        writer = self.ranks[rank]
        writer.arenas[writer.buffer].buffer[:] = content(rank, self.step + 1)
        writer.phase = "exported"

    def commit(self, rank: int) -> None:
        writer = self.ranks[rank]
        self.vaults[rank].commit(writer.header(self.step + 1), writer.buffer)
        writer.buffer = 1 - writer.buffer
        writer.phase = "committed"

    def replicate(self, rank: int, breaks: bool) -> None:
        writer = self.ranks[rank]

        def fill(target: memoryview) -> None:
            source = self.vaults[rank].view(writer.generation, rank, self.step + 1)
            target[:9] = source[:9]
            if breaks:
                raise ConnectionResetError
            target[:] = source

        try:
            self.buddy(rank).receive(writer.header(self.step + 1), index_of(rank), fill)
            writer.phase = "held"
        except ConnectionResetError:
            assert breaks

    @precondition(lambda self: all(writer.phase == "held" for writer in self.ranks))
    @rule()
    def collective(self) -> None:
        """Every rank's wait() returned, and the update's collective went through: the next snapshot may begin."""
        self.step += 1
        self.safe_step = self.step
        event(f"snapshots: {self.step}")
        self.any_complete = True
        for writer in self.ranks:
            writer.phase = "idle"
        if not self.released:
            for vault in self.vaults.values():
                vault.release(self.generation)
            self.released = True

    @rule(lost_node=st.none() | ranks)
    def recover(self, lost_node: int | None) -> None:
        """Workers die wherever they are; perhaps a node goes with its keeper. A new generation takes over."""
        if lost_node is not None:
            self.vaults[lost_node].release(EVER)
            self.vaults[lost_node] = Vault(f"node-{lost_node}")
        for vault in self.vaults.values():
            vault.fence(self.generation + 1)
        self.zombies = [(writer, self.step + 1) for writer in self.ranks]
        if self.any_complete:
            self.step = self.newest_complete(self.vaults.values())
            if lost_node is not None:
                self.restore_replication(lost_node)
        else:
            self.step = 0
        self.begin_generation()

    def restore_replication(self, lost_node: int) -> None:
        """A run is exposed to a second node loss until its next snapshot: here that snapshot is taken at once."""
        self.begin_generation()
        for rank in range(WORLD):
            self.export_half(rank)
            self.export_rest(rank)
            self.commit(rank)
            self.replicate(rank, breaks=False)
        self.collective()
        for vault in self.vaults.values():
            vault.fence(self.generation + 1)

    @precondition(lambda self: self.zombies)
    @rule(number=ranks)
    def zombie_writes(self, number: int) -> None:
        """A worker of the fenced generation that does not know it yet can add nothing, here or at the buddy."""
        writer, step = self.zombies[number]
        if writer.phase in ("exporting", "exported"):
            writer.arenas[writer.buffer].buffer[:] = content(writer.rank, step)
        with pytest.raises(StaleGenerationError):
            self.vaults[writer.rank].commit(writer.header(step), writer.buffer)
        with pytest.raises(StaleGenerationError):
            self.buddy(writer.rank).receive(writer.header(step), index_of(writer.rank), lambda _: pytest.fail("served"))

    def newest_complete(self, vaults: Iterable[Vault]) -> int:
        held: dict[tuple[int, int], set[int]] = {}
        for vault in vaults:
            for stored in vault.inventory():
                header = stored.header
                held.setdefault((header.generation, header.step), set()).add(header.rank)
        complete = [moment for moment, having in held.items() if len(having) == WORLD]
        assert complete, f"no step is whole: {held}"
        return max(complete)[1]

    @invariant()
    def nothing_unverified_is_served(self) -> None:
        for vault in getattr(self, "vaults", {}).values():
            for stored in vault.inventory():
                header = stored.header
                assert bytes(vault.view(header.generation, header.rank, header.step)) == content(
                    header.rank, header.step
                )

    @invariant()
    def at_most_the_step_in_flight_can_be_lost(self) -> None:
        if getattr(self, "any_complete", False):
            assert self.newest_complete(self.vaults.values()) in (self.step, self.step + 1)

    @invariant()
    def what_all_buddies_hold_outlives_any_one_node(self) -> None:
        if not getattr(self, "any_complete", False):
            return
        for lost in range(WORLD):
            survivors = [vault for node, vault in self.vaults.items() if node != lost]
            assert self.newest_complete(survivors) >= self.safe_step

    def teardown(self) -> None:
        for vault in getattr(self, "vaults", {}).values():
            vault.release(EVER)
        self.ranks, self.zombies = [], []


TestPromise = Promise.TestCase
TestPromise.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
