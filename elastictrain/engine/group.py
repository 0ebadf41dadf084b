"""The process group of one generation: formed, aborted from another thread, and closed, many times in one process.

Every worker opens one `Rendezvous` when it starts. For each generation the supervisor names that of rank 0, and the
ranks form a `RankGroup` through it, under keys of their own. DeepSpeed's clone of the world group is made at once too,
so that all connections exist before training and `abort` knows them.

`abort` makes every collective that blocks in this process raise within milliseconds, though its peer is alive and
merely silent. Gloo has no abort that works, so the connections are shut (see sockets.py). Nccl has one, but nothing
that blocks raises: what was under way ends as if it were done (see update_fence.py), and only the next call fails. All
ranks of a generation that is given up must be aborted or gone; one left out waits until its timeout.

Neither the store nor the connections ask who is there: the network between the nodes must be trusted.

Cost: about 10 ms to form a group of a few ranks, 1 ms to abort it, 10 to 20 ms to close it (a round of gloo's loop).
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from elastictrain.engine.device import prepare_process
from elastictrain.engine.failures import peer_loss_named
from elastictrain.engine.reset import forget_group
from elastictrain.engine.sockets import Address, end_reading, interface_with, listeners
from elastictrain.errors import PeerLostError

_INTERFACE = "GLOO_SOCKET_IFNAME"
_POLL_S = 0.005


class Rendezvous:
    """A store server in this process, where the ranks of a generation find each other; open until the process ends."""

    def __init__(self, store: TCPStore, address: str) -> None:
        self._store = store
        self.address = address
        """host:port for `RankGroup`."""

    @classmethod
    def serve(cls, host: str) -> Rendezvous:
        """Open a server on a free port of this address alone. Raises OSError when `host` is none of this machine's."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, 0), family=family, backlog=1024)
        port = listener.getsockname()[1]
        # The store would listen on all interfaces by itself, and it asks nobody for a password.
        store = TCPStore(
            host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach(), use_libuv=True
        )
        return cls(store, f"[{host}]:{port}" if ":" in host else f"{host}:{port}")


class RankGroup:
    """This process's membership in one generation. `form` it, then `close` it; `abort` may come from any thread."""

    def __init__(
        self,
        address: str,
        generation: int,
        rank: int,
        world_size: int,
        *,
        timeout_s: float = 600.0,
        form_timeout_s: float = 60.0,
    ) -> None:
        """`timeout_s` bounds each collective, `form_timeout_s` the wait for the other ranks to appear."""
        host, _, port = address.rpartition(":")
        self._store_address: Address = (socket.gethostbyname(host) if ":" not in host else host.strip("[]"), int(port))
        self.generation = generation
        self.rank = rank
        self.world_size = world_size
        self._timeout = timedelta(seconds=timeout_s)
        self._form_timeout = timedelta(seconds=form_timeout_s)
        self._foreign_listeners: frozenset[Address] | None = None
        self._peers: frozenset[Address] = frozenset()
        self._held: dict[tuple[Address, Address], socket.socket] = {}
        self._lock = threading.Lock()
        self._num_exchanges = 0
        self._shared: Store | None = None
        self._backend = ""
        self._forming = False
        self._aborted = False
        self._chose_interface = False

    def form(self) -> None:
        """Join the other ranks; blocks until all have. Raises PeerLostError when one does not come or goes away."""
        device = prepare_process()
        self._backend = device.backend
        self._foreign_listeners = listeners()
        self._forming = True
        try:
            with peer_loss_named():
                self._shared = store = self._wait_for_all()
                # new_group() takes its timeout from these module variables, and DeepSpeed passes none.
                vars(c10d).update(default_pg_timeout=self._timeout, default_pg_nccl_timeout=self._timeout)
                dist.init_process_group(
                    device.backend,
                    store=store,
                    rank=self.rank,
                    world_size=self.world_size,
                    timeout=self._form_timeout,
                    device_id=device.torch_device if device.is_cuda else None,
                )
                c10d._set_pg_timeout(self._timeout)
                self._join_deepspeed()
                self.know_connections()
            self._check_not_aborted()
        finally:
            self._forming = False

    def announce(self, step: int, news: str) -> None:
        """Tell all ranks, before a collective of this step; who has done that collective with this rank hears it.

        Once a step, from one rank.
        """
        with peer_loss_named():
            self._joined_store().set(f"news/{step}", news)

    def news(self, step: int) -> str:
        """What was announced for this step, else "": the same to all ranks after that collective.

        Costs a message to the rendezvous and back, about 50 us on one node.
        """
        with peer_loss_named():
            store, key = self._joined_store(), f"news/{step}"
            return store.get(key).decode() if store.check([key]) else ""

    def _joined_store(self) -> Store:
        if self._shared is None:
            raise PeerLostError(f"rank {self.rank} is in no group")
        return self._shared

    def from_rank_0(self, choose: Callable[[], int]) -> int:
        """What `choose` gives on rank 0, on all ranks; all call this together."""
        box = [choose() if self.rank == 0 else 0]
        with peer_loss_named():
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def meet(self) -> None:
        """Wait for all ranks to come here."""
        with peer_loss_named():
            dist.barrier()

    def know_connections(self) -> None:
        """Collective: learn of all connections that there are by now, so that `abort` breaks them.

        To be called when further groups of these ranks have been made, and before they are used.
        """
        self._peers = self._exchange_listeners(self._joined_store())

    def abort(self) -> None:
        """Break every collective of this process, blocked or to come; callable from any thread, and more than once.

        Returns within milliseconds, or as soon as `form` has given up.
        """
        self._aborted = True
        self._break_connections()
        while self._forming:
            # What it will wait for next may not be there yet.
            time.sleep(_POLL_S)
            self._break_connections()

    def close(self) -> None:
        """Leave the group and free its connections and threads, whatever state it is in."""
        if dist.is_initialized():
            # A collective still pending on a silent peer would hold the destructor until its timeout.
            self._break_connections()
            dist.destroy_process_group()
        with self._lock:
            self._shared = None
            # An abort that comes late finds nothing, least of all the next group's connections.
            self._foreign_listeners = None
            while self._held:
                self._held.popitem()[1].close()
        forget_group()
        if self._chose_interface:
            del os.environ[_INTERFACE]
            self._chose_interface = False

    def _break_connections(self) -> None:
        with self._lock:
            if self._foreign_listeners is None:
                return
            if self._backend == "nccl":
                _abort_communicators()
                return
            mine = listeners() - self._foreign_listeners
            end_reading(mine, self._peers | {self._store_address}, self._held)

    def _wait_for_all(self) -> Store:
        host, port = self._store_address
        try:
            # A live worker's server never refuses; the store would retry a dead one's until its timeout.
            with socket.create_connection((host, port), timeout=self._form_timeout.total_seconds()) as probe:
                self._choose_interface(probe.getsockname()[0])
        except OSError as error:
            raise PeerLostError(
                f"rank {self.rank} can't reach the rendezvous of generation {self.generation} at {host}:{port}: {error}"
            ) from error
        client = TCPStore(host, port, is_master=False, timeout=self._form_timeout, use_libuv=True)
        store = PrefixStore(f"generation{self.generation}", client)
        deadline = time.monotonic() + self._form_timeout.total_seconds()
        num_joined = store.add("joined", 1)
        while num_joined < self.world_size:
            self._check_not_aborted()
            if time.monotonic() > deadline:
                raise PeerLostError(
                    f"{num_joined} of {self.world_size} ranks of generation {self.generation} came within "
                    f"{self._form_timeout.total_seconds():g} s"
                )
            time.sleep(_POLL_S)
            num_joined = store.add("joined", 0)
        return store

    def _join_deepspeed(self) -> None:
        import deepspeed
        from deepspeed.utils import groups

        deepspeed.init_distributed(dist_backend=self._backend, auto_mpi_discovery=False, timeout=self._timeout)
        groups._clone_world_group()

    def _exchange_listeners(self, store: Store) -> frozenset[Address]:
        mine = sorted(listeners() - (self._foreign_listeners or frozenset()))
        self._num_exchanges += 1
        store.set(f"listeners{self._num_exchanges}/{self.rank}", json.dumps(mine))
        others = [f"listeners{self._num_exchanges}/{rank}" for rank in range(self.world_size) if rank != self.rank]
        store.wait(others, self._form_timeout)
        return frozenset((host, port) for key in others for host, port in json.loads(store.get(key)))

    def _choose_interface(self, address: str) -> None:
        # Gloo would take the address that the host name resolves to: on many machines 127.0.1.1, which no other node
        # reaches. The one that reaches rank 0 is right, and keeps a job on 127.x.x.x off the network.
        interface = interface_with(address)
        if interface is not None and _INTERFACE not in os.environ:
            os.environ[_INTERFACE] = interface
            self._chose_interface = True

    def _check_not_aborted(self) -> None:
        if self._aborted:
            raise PeerLostError(f"generation {self.generation} was given up while rank {self.rank} joined it")


def _abort_communicators() -> None:
    """Have nccl give up what its communicators do, and what they would do next; torch goes on knowing the groups.

    All together: one that waits for another's kernel would never end alone.
    """
    known = list(c10d._world.pg_map.items())
    backends: list[Any] = [
        group._get_backend(torch.device("cuda")) for group, (backend, _) in known if backend == "nccl"
    ]
    if backends:
        backends[0]._group_start()
        for backend in backends:
            backend.abort()
        backends[0]._group_end()
