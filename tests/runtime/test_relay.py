"""Who is asked by a keeper answers into its mail: at once, or together with the others."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from elastictrain.runtime.protocol import Answered, Question
from elastictrain.runtime.relay import relay


class Asked:
    """An actor's handle, whose answers come when the test says so."""

    def __init__(self) -> None:
        self.given: tuple[Any, ...] = ()
        self.reply: Future[Any] = Future()

    @property
    def say(self) -> Asked:
        return self

    def remote(self, *given: Any) -> Asked:
        self.given = given
        return self

    def future(self) -> Future[Any]:
        return self.reply


def ask(question: Question) -> tuple[list[Asked], list[tuple[Answered, bool]]]:
    actors, told = [Asked(), Asked(), Asked()], list[tuple[Answered, bool]]()
    parts = [(ticket, actor, (ticket,)) for ticket, actor in enumerate(actors)]
    relay(question, parts, lambda answer, *, urgent: told.append((answer, urgent)))
    assert [actor.given for actor in actors] == [("common", 0), ("common", 1), ("common", 2)]
    assert told == []
    return actors, told


def test_answers_that_need_each_other_wait_for_the_last_but_a_failure_does_not() -> None:
    actors, told = ask(Question("say", ("common",), together=True))
    actors[1].reply.set_result("b")
    actors[0].reply.set_exception(ValueError("not me"))
    actors[2].reply.set_result("c")
    assert [(answer.ticket, answer.value, urgent) for answer, urgent in told] == [
        (1, "b", False),
        (0, None, True),
        (2, "c", True),
    ]
    failure = told[1][0].failure
    assert failure is not None
    assert failure.cause.message == "ValueError: not me"


def test_answers_that_stand_alone_wait_for_nobody() -> None:
    actors, told = ask(Question("say", ("common",)))
    actors[2].reply.set_result("c")
    assert told == [(Answered(2, "c"), True)]
