"""Nodes that answer and nodes that do not."""

from __future__ import annotations

import socket
import time

from elastictrain.runtime.probe import Probe, answers


def test_who_listens_answers_and_who_does_not_is_told_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as there, socket.create_server(("127.0.0.1", 0)) as gone:
        addresses = {"there": there.getsockname(), "gone": gone.getsockname()}
        gone.close()
        assert answers(addresses["there"])
        assert not answers(addresses["gone"])
        probe = Probe(addresses)
        told: list[str] = []
        end = time.monotonic() + 10
        while not probe.done and time.monotonic() < end:
            told += probe.silent()
        assert told == ["gone"]
        assert probe.silent() == []
        probe.close()


def test_a_host_that_says_nothing_is_waited_for_a_little() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        waiting = []
        for _ in range(4):  # the queue of connections nobody accepts is full after the first: the rest hear nothing
            client = socket.socket()
            client.setblocking(False)
            client.connect_ex(full.getsockname())
            waiting.append(client)
        begun = time.monotonic()
        assert not answers(full.getsockname(), timeout_s=0.2)
        assert time.monotonic() - begun < 5
        for client in waiting:
            client.close()
