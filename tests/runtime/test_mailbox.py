"""Numbered events: in order, none twice, none lost, and a reader that waits is woken."""

from __future__ import annotations

import threading

from elastictrain.runtime.mailbox import Mailbox


def test_events_come_once_and_in_order() -> None:
    mail: Mailbox[str] = Mailbox()
    mail.put("a")
    mail.put("b")
    assert mail.read(0) == [(1, "a"), (2, "b")]
    mail.put("c")
    assert mail.read(2) == [(3, "c")]
    assert mail.read(3) == []


def test_what_was_not_confirmed_is_given_again() -> None:
    mail: Mailbox[str] = Mailbox()
    mail.put("a")
    assert mail.read(0) == mail.read(0) == [(1, "a")]


def test_a_waiting_reader_is_woken() -> None:
    mail: Mailbox[int] = Mailbox()
    got: list[list[tuple[int, int]]] = []
    reader = threading.Thread(target=lambda: got.append(mail.read(0, timeout_s=30)))
    reader.start()
    mail.put(7)
    reader.join(timeout=10)
    assert got == [[(1, 7)]]


def test_what_is_not_urgent_waits_for_more() -> None:
    mail: Mailbox[str] = Mailbox()
    mail.put("a", urgent=False)
    later = threading.Timer(0.05, lambda: mail.put("b", urgent=False))
    later.start()
    assert mail.read(0, timeout_s=30, gather_s=1) == [(1, "a"), (2, "b")]
    later = threading.Timer(0.05, lambda: mail.put("c"))
    later.start()
    assert mail.read(2, timeout_s=30, gather_s=300) == [(3, "c")]
    mail.put("d", urgent=False)
    mail.put("e")
    mail.put("f", urgent=False)
    assert [event for _, event in mail.read(3, timeout_s=30, gather_s=300)] == ["d", "e", "f"]
    assert mail.read(6, timeout_s=0.01, gather_s=300) == []
