"""One shard as a safetensors file: the buffer's bytes as they are, behind a header that names each fragment.

Every fragment is a 1-D F32 tensor `<tensor>@<start>`, so that any safetensors reader can open the file. The header is
written here (it is 8 bytes of length and a JSON object, per the format's public specification) and not by the
library, whose writer needs a second copy of the data in memory and knows nothing of checksums. Reading checks the
header against the manifest's index, so no byte of the file decides where anything is read from.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from typing import Any

from elastictrain.errors import CheckpointError
from elastictrain.state.tensors import BYTES_PER_ELEMENT, ShardIndex

_LENGTH = struct.Struct("<Q")
_ALIGNMENT = 8
_CHUNK_BYTES = 4 << 20


class ShardStream:
    """The file's bytes in chunks, once; `sha256` and `num_bytes` are those of what has been given out."""

    def __init__(self, index: ShardIndex, data: bytes | bytearray | memoryview) -> None:
        if len(data) != index.num_bytes:
            raise CheckpointError(f"a shard of {index.num_bytes} bytes was given {len(data)} bytes of data")
        self._header = _header(index)
        self._data = memoryview(data)
        self._digest = hashlib.sha256()
        self.num_bytes = 0

    @property
    def sha256(self) -> str:
        """Hex digest so far."""
        return self._digest.hexdigest()

    def __iter__(self) -> Iterator[bytes | memoryview]:
        yield self._seen(self._header)
        for start in range(0, len(self._data), _CHUNK_BYTES):
            yield self._seen(self._data[start : start + _CHUNK_BYTES])

    def _seen(self, chunk: Any) -> Any:
        self._digest.update(chunk)
        self.num_bytes += len(chunk)
        return chunk


def data_offset(file: Any, num_bytes: int, index: ShardIndex) -> int:
    """Where the buffer begins in this open file; raises CheckpointError when the header is not that of `index`."""
    length = num_bytes - index.num_bytes - _LENGTH.size
    start = file.read(_LENGTH.size)
    if length < 0 or start != _LENGTH.pack(length):
        raise CheckpointError(f"its header is not of {length} bytes")
    try:
        header = json.loads(file.read(length))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"its header is no safetensors header: {error}") from None
    if not isinstance(header, dict) or {k: v for k, v in header.items() if k != "__metadata__"} != _tensors(index):
        raise CheckpointError("its header does not hold the fragments that the manifest says")
    return _LENGTH.size + length


def _header(index: ShardIndex) -> bytes:
    text = json.dumps(_tensors(index), separators=(",", ":")).encode()
    text += b" " * (-(_LENGTH.size + len(text)) % _ALIGNMENT)
    return _LENGTH.pack(len(text)) + text


def _tensors(index: ShardIndex) -> dict[str, Any]:
    tensors = {}
    for fragment, offset in zip(index.fragments, index.offsets, strict=True):
        if fragment.numel == 0:
            continue
        name = f"{fragment.tensor}@{fragment.start}"
        if name in tensors:
            raise CheckpointError(f"a shard holds two fragments {name}")
        begin = offset * BYTES_PER_ELEMENT
        end = begin + fragment.numel * BYTES_PER_ELEMENT
        tensors[name] = {"dtype": "F32", "shape": [fragment.numel], "data_offsets": [begin, end]}
    return tensors
