"""With a key, only what was signed with it is a checkpoint of the run; the key itself shows nowhere."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from elastictrain.checkpoint.of_run import checkpoints_of
from elastictrain.checkpoint.signature import Signer, split
from elastictrain.checkpoint.store import CheckpointStore, Incomplete, StoredCheckpoint
from elastictrain.config import TrainConfig, blocking_changes
from elastictrain.errors import CheckpointError, ConfigError
from elastictrain.state.manifest import Manifest
from elastictrain.storage import Storage

OLD, NEW = "5" * 64, "c" * 64


@pytest.fixture
def key_file(tmp_path: Path) -> Callable[..., str]:
    """Writes a key file for this user alone."""

    def write(*keys: str, mode: int = 0o600) -> str:
        path = tmp_path / "key"
        path.unlink(missing_ok=True)
        path.touch(0o600)
        path.write_text("\n".join(keys) + "\n")
        path.chmod(mode)
        return str(path)

    return write


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage.open(str(tmp_path / "runs")).run("demo")


def write(store: CheckpointStore, state, step: int) -> StoredCheckpoint:
    index = state.index(0, 1)
    shard = store.write_shard(step, 0, 1, index, state.shard(index))
    return store.commit(Manifest("demo", step, step * 16, "", 1.5, {}, {}, state.tensors, (shard,), 1e9))


def content(storage: Storage, step: int) -> bytes:
    return storage.read(f"checkpoints/step-{step:08d}/manifest.json")


def put(storage: Storage, step: int, data: bytes) -> None:
    storage.write_atomic(f"checkpoints/step-{step:08d}/manifest.json", data)


def test_what_is_signed_verifies_and_reads_as_before(storage: Storage, state, key_file) -> None:
    signed = CheckpointStore(storage, Signer.load(key_file(OLD), "demo"))
    stored = write(signed, state, 1)
    assert stored.signature == "valid"
    assert signed.verify(1, stored.sha256) == stored == signed.list()[0]
    assert state.equals(state.read_from(signed.open(1)))
    assert "signature" in json.loads(content(storage, 1))
    without_key = CheckpointStore(storage).verify(1, stored.sha256)
    assert without_key.signature == "unchecked"
    assert without_key.manifest == stored.manifest


def unsigned(storage: Storage) -> None:
    put(storage, 2, split(content(storage, 2))[0])


def changed(storage: Storage) -> None:
    put(storage, 2, content(storage, 2).replace(b'"samples":32', b'"samples":31'))


def other_signature(storage: Storage) -> None:
    _, signature = split(content(storage, 2))
    put(storage, 2, content(storage, 2).replace(signature.encode(), b"0" * 64))


def of_another_run(storage: Storage) -> None:
    data, _ = split(content(storage, 2))
    put(storage, 2, Signer("other", (OLD.encode(),)).sign(data))


def twice(storage: Storage) -> None:
    put(storage, 2, Signer("demo", (NEW.encode(),)).sign(content(storage, 2)))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (unsigned, r"it is not signed.*--sign"),
        (changed, "its signature is not that of run demo"),
        (other_signature, "its signature is not that of run demo"),
        (of_another_run, "its signature is not that of run demo"),
        (twice, "its signature is not that of run demo"),
    ],
)
def test_what_is_not_signed_with_the_key_is_rejected_and_the_one_before_used(
    storage: Storage, state, key_file, damage: Callable[[Storage], None], message: str
) -> None:
    store = CheckpointStore(storage, Signer.load(key_file(OLD), "demo"))
    record = {stored.step: stored.sha256 for stored in (write(store, state, 1), write(store, state, 2))}
    damage(storage)
    for read in (store.verify, store.open):
        with pytest.raises(CheckpointError, match=rf"step-00000002/manifest\.json can't be used: {message}"):
            read(2)
    assert isinstance(store.scan()[0], Incomplete)
    rejected = []
    found = store.newest_verified(record, lambda *what: rejected.append(what), lambda manifest: "")
    assert found is not None
    assert (found.step, [step for step, _, _ in rejected]) == (1, [2])


def test_a_key_is_changed_by_putting_the_new_one_first(storage: Storage, state, key_file) -> None:
    write(CheckpointStore(storage, Signer.load(key_file(OLD), "demo")), state, 1)
    both = CheckpointStore(storage, Signer.load(key_file(NEW, OLD), "demo"))
    write(both, state, 2)
    assert [found.step for found in both.list()] == [2, 1]
    new = CheckpointStore(storage, Signer.load(key_file(NEW), "demo"))
    assert [found.step for found in new.list()] == [2]


def test_what_was_written_before_there_was_a_key_can_be_signed(storage: Storage, state, key_file) -> None:
    plain = CheckpointStore(storage)
    stored = write(plain, state, 1)
    write(plain, state, 2)
    store = CheckpointStore(storage, Signer.load(key_file(OLD), "demo"))
    store.sign(1, stored.sha256)
    assert store.verify(1, stored.sha256).sha256 == stored.sha256
    with pytest.raises(CheckpointError, match="the run's record says"):
        store.sign(2, stored.sha256)
    assert [found.step for found in store.list()] == [1]


@pytest.mark.parametrize("mode", [0o604, 0o644, 0o602, 0o620, 0o666])
def test_a_key_that_others_can_read_or_change_is_refused(key_file, mode: int) -> None:
    with pytest.raises(ConfigError, match=rf"has mode {mode:04o}.*chmod 600"):
        Signer.load(key_file(OLD, mode=mode), "demo")


def test_a_key_of_a_group_is_taken(key_file) -> None:
    assert Signer.load(key_file(OLD, mode=0o440), "demo")


def test_what_is_no_key_is_refused(tmp_path: Path, key_file) -> None:
    for keys in ((), ("short",), (OLD, "short")):
        with pytest.raises(ConfigError, match="at least 32 characters"):
            Signer.load(key_file(*keys), "demo")
    with pytest.raises(ConfigError, match=r"No such file.*Every node needs it"):
        Signer.load(str(tmp_path / "nowhere"), "demo")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe, 0o600)
    for odd in (pipe, tmp_path):
        with pytest.raises(ConfigError, match="signing_key_file"):
            Signer.load(str(odd), "demo")


def test_the_key_shows_nowhere(key_file) -> None:
    signer = Signer.load(key_file(OLD), "demo")
    assert OLD not in repr(signer)
    with pytest.raises(TypeError, match="does not leave its process"):
        pickle.dumps(signer)
    with pytest.raises(ConfigError) as caught:
        Signer.load(key_file(OLD, "short"), "demo")
    assert OLD not in str(caught.value)


def test_the_config_names_the_key_and_not_in_the_storage(tmp_path: Path, state, key_file) -> None:
    config = TrainConfig.load(None, [f"run.storage={tmp_path / 'runs'}", "run.name=demo"])
    path = key_file(OLD)
    signing = TrainConfig.load(
        None, [f"run.storage={tmp_path / 'runs'}", "run.name=demo", f"checkpoint.signing_key_file={path}"]
    )
    assert write(checkpoints_of(signing), state, 1).signature == "valid"
    assert checkpoints_of(config).list()[0].signature == "unchecked"
    assert blocking_changes(config, signing) == [], "a run may get, change or lose its key between submissions"
    assert OLD not in signing.to_yaml()
    inside = TrainConfig.load(None, [f"run.storage={tmp_path}", f"checkpoint.signing_key_file={path}"])
    with pytest.raises(ConfigError, match=r"lies in run\.storage"):
        checkpoints_of(inside)
    Path(path).unlink()
    with pytest.raises(ConfigError, match=r"can't read checkpoint\.signing_key_file"):
        checkpoints_of(signing)
    with pytest.raises(ConfigError, match="signing_key_file"):
        TrainConfig.load(None, ["checkpoint.signing_key_file=secrets/key"])
