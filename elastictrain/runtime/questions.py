"""Asking many workers for something with one message a node: its keeper relays it, and tells what they answer.

A node with a single worker to ask is asked directly: that is one message too, and no detour in a recovery. So is one
whose keeper is away. What all workers of a question are told travels once a node. Answers come in the keeper's mail,
beside its other news: one that is of no use before the others' waits a little for them.

A keeper that is lost takes along what it has not told. Questions that may be asked twice are asked again, directly;
the others are dropped, since no generation outlives the loss of one of its keepers.
"""

from __future__ import annotations

import itertools
import secrets
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ray.exceptions import RayError

from elastictrain.runtime.causes import Failure, failure_of
from elastictrain.runtime.fleet import Fleet, Node
from elastictrain.runtime.protocol import Answered, Question
from elastictrain.runtime.replies import Replies

Take = Callable[[str, Any], None]
"""Gets a worker's name, and its answer."""
Fail = Callable[[str, Failure], None]


@dataclass(frozen=True, slots=True)
class _Asked:
    """One worker's part of a question."""

    worker: str
    question: Question
    own: tuple[Any, ...]
    take: Take
    fail: Fail
    keeper: Any = None
    """That relays it."""


class Questions:
    """The driver's side. Handlers run where `replies` and keepers' news are handled, one at a time."""

    def __init__(self, fleet: Fleet, replies: Replies, keeper_failed: Callable[[str, RayError], None]) -> None:
        self._fleet, self._replies, self._keeper_failed = fleet, replies, keeper_failed
        self._open: dict[int, _Asked] = {}
        """What keepers relay, by ticket."""
        # begun anywhere: what a keeper still tells about the questions of an earlier driver is nobody's here
        self._tickets = itertools.count(secrets.randbits(62))

    def ask(
        self,
        question: Question,
        workers: Sequence[str],
        take: Take,
        fail: Fail,
        *,
        own: Mapping[str, tuple[Any, ...]] | None = None,
    ) -> None:
        """Ask these workers; each is answered for by one call of `take` or `fail`, but for what a lost keeper drops.

        `own` has arguments that follow the common ones, by worker.
        """
        by_node: dict[str, list[_Asked]] = defaultdict(list)
        for name in workers:
            asked = _Asked(name, question, (own or {}).get(name, ()), take, fail)
            by_node[self._fleet.workers[name].node].append(asked)
        for name, there in by_node.items():
            node = self._fleet.nodes.get(name)
            if len(there) > 1 and node is not None and node.info is not None:
                self._relay(node, question, there)
            else:
                for asked in there:
                    self._ask(asked)

    def answered(self, answer: Answered) -> None:
        """A keeper tells what a worker said."""
        asked = self._open.pop(answer.ticket, None)
        if asked is None:
            return
        if answer.failure is not None:
            asked.fail(asked.worker, answer.failure)
        else:
            asked.take(asked.worker, answer.value)

    def lost(self, keeper: Any) -> None:
        """Nothing comes from this keeper any more."""
        self._take_back([ticket for ticket, asked in self._open.items() if asked.keeper is keeper])

    def insist(self) -> None:
        """Ask again, directly, what may be asked twice and keepers have not answered: one of them may hang."""
        self._take_back([ticket for ticket, asked in self._open.items() if asked.question.again])

    def _take_back(self, tickets: Sequence[int]) -> None:
        for asked in [self._open.pop(ticket) for ticket in tickets]:
            if asked.question.again and asked.worker in self._fleet.workers:
                self._ask(asked)

    def _ask(self, asked: _Asked) -> None:
        call = getattr(self._fleet.workers[asked.worker].actor, asked.question.method)
        self._replies.expect(
            call.remote(*asked.question.common, *asked.own),
            partial(asked.take, asked.worker),
            lambda error: asked.fail(asked.worker, failure_of(error)),
        )

    def _relay(self, node: Node, question: Question, there: Sequence[_Asked]) -> None:
        parts = []
        for asked in there:
            ticket = next(self._tickets)
            self._open[ticket] = replace(asked, keeper=node.keeper)
            parts.append((ticket, self._fleet.workers[asked.worker].actor, asked.own))
        self._replies.expect(
            node.keeper.relay.remote(question, parts),
            lambda _: None,
            partial(self._refused, node, node.keeper),
        )

    def _refused(self, node: Node, keeper: Any, error: RayError) -> None:
        if self._fleet.nodes.get(node.name) is node and node.keeper is keeper:
            self._keeper_failed(node.name, error)
