"""The keeper's part in asking workers: the driver's one message becomes a call of each worker; see `questions`.

Nothing here waits: each answer goes into the keeper's mail when it comes.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Protocol

from elastictrain.runtime.causes import failure_of
from elastictrain.runtime.protocol import Answered, Question


class Tell(Protocol):
    """Puts an answer into the mail."""

    def __call__(self, answer: Answered, /, *, urgent: bool) -> None: ...


def relay(question: Question, parts: Sequence[tuple[int, Any, tuple[Any, ...]]], tell: Tell) -> None:
    """Ask each worker for its part: (ticket, actor, own arguments). `tell` is called in threads of Ray's."""
    left, lock = len(parts), threading.Lock()

    def answered(ticket: int, reply: Future[Any]) -> None:
        nonlocal left
        answer = _answer(ticket, reply)
        with lock:
            left -= 1
            tell(answer, urgent=not (left and question.together) or answer.failure is not None)

    for ticket, actor, own in parts:
        asked = getattr(actor, question.method).remote(*question.common, *own)
        asked.future().add_done_callback(partial(answered, ticket))


def _answer(ticket: int, reply: Future[Any]) -> Answered:
    try:
        return Answered(ticket, reply.result())
    except Exception as error:  # noqa: BLE001 - whatever it is: who asked waits for an answer
        return Answered(ticket, failure=failure_of(error))
