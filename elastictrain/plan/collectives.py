"""Seconds that collectives take over n ranks (pure): ring algorithms, as NCCL and gloo run them for large messages.

Thakur, Rabenseifner and Gropp 2005 ("Optimization of Collective Communication Operations in MPICH"): with latency a
and b seconds a byte, a ring all-gather or reduce-scatter of a whole of s bytes takes (n - 1) a + s b (n - 1) / n, an
all-reduce is one of each, and an all-to-all exchanges s (n - 1) / n bytes in n - 1 messages. Nothing for one rank.
"""

from __future__ import annotations

from elastictrain.plan.cluster import Link


def all_gather_s(num_bytes: float, ranks: int, link: Link) -> float:
    """Every rank has its share of `num_bytes` and gets the others'; a reduce-scatter, the other way round, as long."""
    return (ranks - 1) * (link.latency_s + num_bytes / ranks / link.bytes_per_s)


def all_reduce_s(num_bytes: float, ranks: int, link: Link) -> float:
    """Every rank has `num_bytes` and gets the sum."""
    return 2 * all_gather_s(num_bytes, ranks, link)


def all_to_all_s(num_bytes: float, ranks: int, link: Link) -> float:
    """Every rank has `num_bytes`, an equal part for each of the ranks."""
    return all_gather_s(num_bytes, ranks, link)


def send_s(num_bytes: float, link: Link) -> float:
    """One message."""
    return link.latency_s + num_bytes / link.bytes_per_s
