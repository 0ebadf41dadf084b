"""Telling a group's connections from others by their listeners."""

from __future__ import annotations

import socket
import threading

from elastictrain.engine.sockets import end_reading, interface_with, listeners


def test_a_listener_is_found_by_its_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert server.getsockname() in listeners()
        address = server.getsockname()
    assert address not in listeners()


def test_only_connections_of_the_named_listeners_end_and_a_blocked_read_returns() -> None:
    with socket.create_server(("127.0.0.1", 0)) as ours, socket.create_server(("127.0.0.1", 0)) as other:
        to_ours = socket.create_connection(ours.getsockname())
        accepted, _ = ours.accept()
        to_other = socket.create_connection(other.getsockname())
        bystander, _ = other.accept()
        held: dict[object, socket.socket] = {}
        read: list[bytes] = []
        reader = threading.Thread(target=lambda: read.append(accepted.recv(1)))
        reader.start()
        end_reading({ours.getsockname()}, {ours.getsockname()}, held)  # type: ignore[arg-type]  # pairs, of longer tuples
        reader.join(timeout=10)
        assert read == [b""]
        assert len(held) == 2
        # What was in flight the other way is still delivered, and nobody is reset.
        to_ours.sendall(b"x")
        to_other.sendall(b"y")
        assert bystander.recv(1) == b"y"
        end_reading({ours.getsockname()}, set(), held)  # type: ignore[arg-type]  # pairs, of longer tuples
        assert len(held) == 2
        for sock in (to_ours, accepted, to_other, bystander, *held.values()):
            sock.close()


def test_the_end_a_peer_accepted_is_known_by_the_peers_listener() -> None:
    with socket.create_server(("127.0.0.1", 0)) as peer:
        connection = socket.create_connection(peer.getsockname())
        held: dict[object, socket.socket] = {}
        end_reading(set(), {peer.getsockname()}, held)  # type: ignore[arg-type]  # pairs, of longer tuples
        assert connection.recv(1) == b""
        for sock in (connection, *held.values()):
            sock.close()


def test_an_interface_is_found_by_its_address() -> None:
    assert interface_with("127.0.0.1") == "lo"
    assert interface_with("203.0.113.7") is None
