"""The checksum of state in memory: xxh3_64, made to find damage and torn copies (not malice; files have SHA-256).

About 12 GB/s on one core, and other threads run meanwhile.
"""

from __future__ import annotations

import xxhash


def checksum(data: bytes | bytearray | memoryview) -> str:
    """xxh3_64 of the bytes, hex."""
    return xxhash.xxh3_64_hexdigest(data)
