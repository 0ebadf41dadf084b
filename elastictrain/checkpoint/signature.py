"""Signed manifests: HMAC-SHA256 with a key that the storage does not have, so that who writes there can forge none.

A manifest holds the SHA-256 of every shard, so signing it signs the checkpoint. The signature is the last field of
manifest.json, put there as bytes and taken off as bytes: what it signs is the file as it is without it, and there is
no second way to write that down. The run's name is signed too: a checkpoint of another run under the same key is
refused. The key is read from a file, never from the config, and leaves the process in no form: a `Signer` shows no
key and does not pickle. Cost: microseconds a manifest.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from elastictrain.errors import CheckpointError, ConfigError

_CONTEXT = b"elastictrain checkpoint manifest 1\0"
_FIELD = re.compile(rb',"signature":"hmac-sha256:([0-9a-f]{64})"\}\n\Z')
_END = b"}\n"
_MIN_KEY_LENGTH = 32
_MAX_FILE_BYTES = 1 << 16
_OTHERS = stat.S_IWGRP | stat.S_IRWXO
"""What the key's file must not allow. Its group may read it: secrets are mounted so on Kubernetes."""
_MAKE_ONE = "`(umask 077; openssl rand -hex 32 > FILE)` makes one"


@dataclass(frozen=True)
class Signer:
    """Signs and checks the manifests of one run."""

    run: str
    _keys: tuple[bytes, ...] = field(repr=False)
    """The first signs; all are good for checking, so that a key can be changed while the old one's work is in use."""

    @classmethod
    def load(cls, path: str, run: str) -> Signer:
        """The signer of this run with the keys in this file, one a line; raises ConfigError with the way out."""
        return cls(run, _keys(Path(path).expanduser()))

    def sign(self, manifest: bytes) -> bytes:
        """The content of manifest.json with the signature in it; `manifest` has none."""
        if not manifest.endswith(_END):
            raise ValueError("a manifest is one JSON object and a newline")
        digest = self._digest(self._keys[0], manifest)
        return manifest[: -len(_END)] + f',"signature":"hmac-sha256:{digest}"'.encode() + _END

    def check(self, manifest: bytes, signature: str) -> None:
        """Raise CheckpointError unless the signature is that of this manifest, under one of the keys."""
        if not signature:
            raise CheckpointError(
                "it is not signed, and there is a key (checkpoint.signing_key_file) under which it should be. If it "
                "was written before there was one and you trust it, `elastictrain checkpoints RUN --sign` signs it"
            )
        if not any(hmac.compare_digest(self._digest(key, manifest), signature) for key in self._keys):
            raise CheckpointError(
                f"its signature is not that of run {self.run} under any key in checkpoint.signing_key_file: it was "
                f"changed, or signed with another key or for another run"
            )

    def _digest(self, key: bytes, manifest: bytes) -> str:
        return hmac.new(key, _CONTEXT + self.run.encode() + b"\0" + manifest, hashlib.sha256).hexdigest()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a signing key does not leave its process: every process reads checkpoint.signing_key_file")


def split(content: bytes) -> tuple[bytes, str]:
    """The manifest as it was signed, and its signature, hex; "" where it has none."""
    found = _FIELD.search(content)
    return (content[: found.start()] + _END, found[1].decode()) if found else (content, "")


def _keys(path: Path) -> tuple[bytes, ...]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ConfigError(f"checkpoint.signing_key_file {path} is no regular file: {_MAKE_ONE}.")
            if status.st_mode & _OTHERS:
                raise ConfigError(
                    f"checkpoint.signing_key_file {path} has mode {stat.S_IMODE(status.st_mode):04o}: others than its "
                    f"owner can read or change it. `chmod 600 {path}`, and if others may have read it, make a new key."
                )
            content = file.read(_MAX_FILE_BYTES)
    except OSError as error:
        raise ConfigError(
            f"can't read checkpoint.signing_key_file {path} on {os.uname().nodename}: {error.strerror}. Every node "
            f"needs it at this path; {_MAKE_ONE}."
        ) from None
    keys = tuple(line.strip() for line in content.splitlines() if line.strip())
    if not keys or min(map(len, keys)) < _MIN_KEY_LENGTH:
        raise ConfigError(
            f"checkpoint.signing_key_file {path} must hold keys of at least {_MIN_KEY_LENGTH} characters, one a line: "
            f"{_MAKE_ONE}."
        )
    return keys
