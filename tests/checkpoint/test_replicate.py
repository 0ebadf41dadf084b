"""Replicas over real sockets: whole or not at all, and only for those who hold the token."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from elastictrain.checkpoint.replicate import ReplicaClient, ReplicaServer
from elastictrain.checkpoint.vault import Vault
from elastictrain.checkpoint.wire import Link
from elastictrain.errors import CheckpointError, InfrastructureError, StaleGenerationError
from elastictrain.state.tensors import ShardHeader

TOKEN = b"t" * 32


@pytest.fixture
def vault() -> Vault:
    return Vault("buddy")


@pytest.fixture
def server(vault: Vault) -> Iterator[ReplicaServer]:
    server = ReplicaServer(vault, "127.0.0.1", TOKEN, timeout_s=5)
    yield server
    server.close()


@pytest.fixture
def client(server: ReplicaServer) -> Iterator[ReplicaClient]:
    with ReplicaClient(server.address, TOKEN, timeout_s=5) as client:
        yield client


def held(vault: Vault) -> list[tuple[int, int]]:
    return sorted((s.header.rank, s.header.step) for s in vault.inventory())


def test_put_and_read_back_ranges(vault: Vault, client: ReplicaClient, state) -> None:
    for step in (1, 2, 3):
        for rank in (0, 1):
            index = state.index(rank, 2)
            client.put(state.header(index, rank, 2, step), index, memoryview(state.shard(index)))
    assert held(vault) == [(0, 2), (0, 3), (1, 2), (1, 3)]
    stored = next(s for s in vault.inventory() if (s.header.rank, s.header.step) == (1, 3))
    index = state.index(1, 2)
    assert stored.header == state.header(index, 1, 2, 3)
    assert stored.index == index
    assert stored.replica

    whole = np.frombuffer(state.shard(index), np.float32)
    targets = [(3, np.zeros(4, np.float32)), (0, np.zeros(1, np.float32)), (3, np.zeros(20, np.float32))]
    client.read(1, 1, 3, [(offset, memoryview(array).cast("B")) for offset, array in targets])
    for offset, array in targets:
        assert np.array_equal(array, whole[offset : offset + len(array)])


def test_the_vaults_refusals_arrive_as_themselves(vault: Vault, client: ReplicaClient, state) -> None:
    index = state.index(0, 2)
    data = memoryview(state.shard(index))
    client.put(state.header(index, 0, 2, 1), index, data)
    with pytest.raises(CheckpointError, match="arrived damaged"):
        client.put(state.header(index, 0, 2, 2), index, memoryview(bytes(len(data))))
    with pytest.raises(CheckpointError, match="does not fit the index"):
        client.put(state.header(index, 0, 2, 2), index, data[:-4])
    with pytest.raises(CheckpointError, match="no snapshot of step 9"):
        client.read(1, 0, 9, [(0, memoryview(bytearray(4)))])
    with pytest.raises(CheckpointError, match=r"bytes \[0, 4000\) asked of a snapshot of \d+ bytes"):
        client.read(1, 0, 1, [(0, memoryview(bytearray(4000)))])
    vault.fence(2)
    with pytest.raises(StaleGenerationError, match="generation 1 is fenced"):
        client.put(state.header(index, 0, 2, 2), index, data)
    client.put(state.header(index, 0, 2, 2, generation=2), index, data)  # The connection outlived all of it.
    assert [(s.header.generation, s.header.step) for s in vault.inventory()] == [(1, 1), (2, 2)]


def test_a_commit_is_answered_twice(vault: Vault, state) -> None:
    """When it counts, and when the buddy has it; a refusal has the vault's own words."""
    replicated = threading.Event()

    def commit(header: ShardHeader, buffer: int) -> Callable[[], None]:
        vault.commit(header, buffer)
        return lambda: bool(replicated.wait(5))

    index = state.index(0, 2)
    server = ReplicaServer(vault, "127.0.0.1", TOKEN, timeout_s=5, on_commit=commit)
    try:
        vault.attach(1, 0, 2, index)
        with ReplicaClient(server.address, TOKEN, timeout_s=5) as client:
            held_elsewhere = client.commit(state.header(index, 0, 2, 1), 0)
            assert [s.header.step for s in vault.inventory(verify=False)] == [1]
            threading.Timer(0.05, replicated.set).start()
            held_elsewhere()
            assert replicated.is_set()
            with pytest.raises(CheckpointError, match="not newer than step 1"):
                client.commit(state.header(index, 0, 2, 1), 1)
            vault.fence(2)
            with pytest.raises(StaleGenerationError):
                client.commit(state.header(index, 0, 2, 2), 1)
    finally:
        server.close()


def test_a_keeper_without_ranks_takes_no_commit(client: ReplicaClient, state) -> None:
    with pytest.raises(InfrastructureError, match="while committing step 1 of rank 0"):
        client.commit(state.header(state.index(0, 2), 0, 2, 1), 0)


def test_a_repeated_put_is_fine(vault: Vault, server: ReplicaServer, state) -> None:
    index = state.index(0, 2)
    for _ in range(2):
        with ReplicaClient(server.address, TOKEN) as client:
            client.put(state.header(index, 0, 2), index, memoryview(state.shard(index)))
    assert held(vault) == [(0, 1)]


def test_without_the_token_nothing_is_served(
    vault: Vault, server: ReplicaServer, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(InfrastructureError, match="do not hold the same token"):
        ReplicaClient(server.address, b"x" * 32, timeout_s=5)
    server.close()
    assert "does not hold this run's token" in caplog.text


@pytest.mark.parametrize(
    "hello", [b"GET / HTTP/1.1\r\n\r\n", b"\0\0\0\4nope" * 3, struct.pack("!I", 1 << 31), b"\x80\x04\x95", b""]
)
def test_strangers_are_dropped(vault: Vault, server: ReplicaServer, hello: bytes, state) -> None:
    with socket.create_connection(server.address, timeout=10) as stranger:
        stranger.sendall(hello)
        stranger.shutdown(socket.SHUT_WR)
        with stranger.makefile("rb") as answer:
            assert len(answer.read()) < 100  # The challenge, then the end.
    index = state.index(0, 2)
    with ReplicaClient(server.address, TOKEN) as client:
        client.put(state.header(index, 0, 2), index, memoryview(state.shard(index)))


def test_a_stranger_that_answers_the_client_is_not_believed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def stranger() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"\0\0\0\5hello")
                connection.recv(100)

        thread = threading.Thread(target=stranger)
        thread.start()
        with pytest.raises(InfrastructureError, match="do not hold the same token"):
            ReplicaClient(listener.getsockname(), TOKEN, timeout_s=5)
        thread.join()


def authenticated(server: ReplicaServer, timeout_s: float = 5) -> Link:
    link = Link(socket.create_connection(server.address), timeout_s)
    link.answer(TOKEN)
    return link


@pytest.mark.parametrize("then", ["close", "stall"])
def test_a_half_sent_snapshot_is_never_held(vault: Vault, then: str, state) -> None:
    server = ReplicaServer(vault, "127.0.0.1", TOKEN, timeout_s=0.2)
    index = state.index(0, 2)
    data = state.shard(index)
    with ReplicaClient(server.address, TOKEN) as client:
        client.put(state.header(index, 0, 2, 1), index, memoryview(data))
    link = authenticated(server)
    header = vars(state.header(index, 0, 2, 2))
    link.send({"op": "put", "header": header, "num_bytes": len(data), "index": index.to_json()})
    assert link.receive() == {"go": True}
    link.write(memoryview(data)[: len(data) // 2])
    link.flush()
    if then == "stall":
        with pytest.raises((EOFError, OSError)):  # The server gives up on it.
            link.receive()
    link.close()
    server.close()
    assert held(vault) == [(0, 1)]
    assert len(vault.inventory(verify=False)) == 1


@pytest.mark.parametrize(
    "message",
    [
        b"{}",
        b"[]",
        b"not json",
        b'{"op":"delete"}',
        b'{"op":"put"}',
        b'{"op":"put","header":{"generation":1}}',
        b'{"op":"read","generation":"x","rank":0,"step":0,"ranges":0}',
        b"\x80\x04\x95\x20\0\0\0\0\0\0\0\x8c\5posix\x94\x8c\6system\x94\x93\x94.",
    ],
)
def test_nonsense_ends_the_connection_and_not_the_server(
    vault: Vault, server: ReplicaServer, message: bytes, state
) -> None:
    link = authenticated(server)
    link.send_bytes(message)
    with contextlib.suppress(EOFError, OSError):
        assert "error" in link.receive()
    link.close()
    index = state.index(0, 2)
    with ReplicaClient(server.address, TOKEN) as client:
        client.put(state.header(index, 0, 2), index, memoryview(state.shard(index)))


def test_frames_are_bounded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    link = Link(ours, 5)
    theirs.sendall(struct.pack("!I", (64 << 20) + 1))
    with pytest.raises(ValueError, match="at most 67108864 are allowed"):
        link.receive()
    link.close()
    theirs.close()


def test_the_index_travels_once(vault: Vault, state) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        seen: list[dict] = []

        def keeper() -> None:
            connection, _ = listener.accept()
            link = Link(connection, 5)
            link.challenge(TOKEN)
            for _ in range(3):
                seen.append(link.receive())
                link.send({"ok": True})
            link.close()

        thread = threading.Thread(target=keeper)
        thread.start()
        index = state.index(0, 2)
        with ReplicaClient(listener.getsockname(), TOKEN, timeout_s=5) as client:
            for step, generation in ((1, 1), (2, 1), (3, 2)):
                client.put(state.header(index, 0, 2, step, generation), index, memoryview(state.shard(index)))
        thread.join()
    assert ["index" in request for request in seen] == [True, False, True]
    assert all(json.dumps(request) for request in seen)


def test_a_keeper_that_stalls_or_is_gone(server: ReplicaServer, state) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with pytest.raises(InfrastructureError, match=r"while the handshake: .*timed out"):
            ReplicaClient(silent.getsockname(), TOKEN, timeout_s=0.1)
        gone = silent.getsockname()
    with pytest.raises(InfrastructureError, match=r"lost the keeper at 127\.0\.0\.1:\d+ while connecting"):
        ReplicaClient(gone, TOKEN, timeout_s=1)
    client = ReplicaClient(server.address, TOKEN, timeout_s=5)
    server.close()
    index = state.index(0, 2)
    with pytest.raises(InfrastructureError, match="while replicating step 1 of rank 0"):
        client.put(state.header(index, 0, 2), index, memoryview(state.shard(index)))
    client.close()


def test_a_busy_port_and_a_foreign_address_are_said(server: ReplicaServer) -> None:
    host, port = server.address
    with pytest.raises(InfrastructureError, match=f"can't listen on {host} port {port}: Address already in use"):
        ReplicaServer(Vault("b"), host, TOKEN, port=port)
    with pytest.raises(InfrastructureError, match=r"can't listen on 192\.0\.2\.1"):
        ReplicaServer(Vault("b"), "192.0.2.1", TOKEN)


def test_close_leaves_no_thread_and_no_descriptor(vault: Vault, state) -> None:
    gc.collect()  # What earlier tests left is not counted.
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    server = ReplicaServer(vault, "127.0.0.1", TOKEN)
    clients = [ReplicaClient(server.address, TOKEN) for _ in range(3)]
    server.close()
    assert threading.active_count() == threads
    for client in clients:
        client.close()
        client.close()
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_new_token_ends_every_connection_of_before(server: ReplicaServer, client: ReplicaClient, state) -> None:
    index = state.index(0, 1)
    client.put(state.header(index, 0, 1, 1), index, memoryview(state.shard(index)))
    server.rekey(b"n" * 32)
    with pytest.raises(InfrastructureError):
        client.put(state.header(index, 0, 1, 2), index, memoryview(state.shard(index)))
    with pytest.raises(InfrastructureError, match="do not hold the same token"):
        ReplicaClient(server.address, TOKEN, timeout_s=5)
    with ReplicaClient(server.address, b"n" * 32, timeout_s=5) as successor:
        successor.put(state.header(index, 0, 1, 2), index, memoryview(state.shard(index)))
