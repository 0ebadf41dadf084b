"""Preparing data: Ray Data reads, tokenises and packs the corpus into token shards, once.

The folder is named by a fingerprint of everything that goes in, so equal text under an equal config is found again and
anything else gets a folder of its own. What is found is checked by SHA-256; only what is missing or damaged is made,
one Ray task a shard, so a preparation that was killed goes on where it stood, and any number of CPUs gives the same
bytes. One process prepares a folder at a time; a second waits, then finds everything there.

Cost: 12 MB of text take 0.05 s to check when nothing is to be done, else 7 s on two cores: 1 s for the tokenizer, 3 to
4 s until Ray Data's first task runs, then 4 MB/s of text on each CPU. All nodes must see the corpus and the folder.
"""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from elastictrain.config import DataSection, TrainConfig
from elastictrain.data.corpus import Corpus, find_documents, too_little_text
from elastictrain.data.manifest import (
    MANIFEST_NAME,
    PASSING_SUFFIX,
    Manifest,
    ShardRecord,
    file_sha256,
    replacing,
)
from elastictrain.data.pack import write_shard
from elastictrain.data.recipe import fingerprint, plan_shards, tokenizer_text
from elastictrain.data.spans import Span
from elastictrain.data.tokenizer import TOKENIZER_NAME, Tokenizer, given_tokenizer
from elastictrain.errors import DataError, InfrastructureError

_log = logging.getLogger(__name__)

_TOKENIZER_DIGEST_NAME = "tokenizer.sha256"


_RAY_DATA_HELPERS = {
    ("_dataset_stats_actor", "datasets_stats_actor"),
    ("AutoscalingCoordinator", "AutoscalingCoordinator"),
}
"""(namespace, name) of actors that Ray Data 2.x starts."""


@dataclass(frozen=True)
class Prepared:
    """Data that is ready, and what that took."""

    manifest: Manifest
    num_made: int
    """Shards that were made now; the others were there and intact."""
    seconds: float

    @property
    def reused(self) -> bool:
        """Nothing had to be made."""
        return self.num_made == 0


def prepare(config: TrainConfig, folder: Path) -> Prepared:
    """Have the config's corpus as token shards in a subfolder of `folder`.

    The calling process is connected to Ray. Raises DataError for what is wrong with the corpus, InfrastructureError
    for what is wrong with the folder or the cluster.
    """
    begun = perf_counter()
    data = config.data
    corpus, given = find_documents(data), given_tokenizer(config)
    digest = fingerprint(corpus, data, given)
    home = folder.absolute() / digest[:16]
    with _alone(home):
        tokenizer = _tokenizer(corpus, data, home, given)
        plan = plan_shards(corpus, data)
        missing = {name: spans for name, spans in plan.items() if not _is_intact(home, name, tokenizer)}
        if missing:
            _make(missing, home, data.seq_len)
        records = {name: _record(home, name) for name in plan}
        manifest = Manifest(
            folder=home,
            fingerprint=digest,
            seq_len=data.seq_len,
            vocab_size=tokenizer.vocab_size,
            tokenizer_sha256=tokenizer.sha256(),
            num_documents=len(corpus.documents),
            num_empty=corpus.num_empty,
            num_bytes=corpus.num_bytes,
            train=tuple(record for name, record in records.items() if name.startswith("train")),
            validation=tuple(record for name, record in records.items() if name.startswith("validation")),
        )
        for part, shards in (("training", manifest.train), ("validation", manifest.validation)):
            if not sum(shard.num_samples for shard in shards):
                raise too_little_text(data, part, f"{sum(shard.num_tokens for shard in shards)} tokens")
        with replacing(home / MANIFEST_NAME) as file:
            file.write(manifest.to_json().encode())
    return Prepared(manifest, len(missing), perf_counter() - begun)


def _tokenizer(corpus: Corpus, data: DataSection, home: Path, given: Tokenizer | None) -> Tokenizer:
    path, digest_path = home / TOKENIZER_NAME, home / _TOKENIZER_DIGEST_NAME
    if path.is_file() and digest_path.is_file() and digest_path.read_bytes() == file_sha256(path).encode():
        return Tokenizer.load(path)
    tokenizer = given or Tokenizer.train(tokenizer_text(corpus.train), data.vocab_size)
    for name, content in tokenizer.files().items():
        with replacing(home / name) as file:
            file.write(content.encode())
    with replacing(digest_path) as file:
        file.write(tokenizer.sha256().encode())
    return tokenizer


def _is_intact(home: Path, name: str, tokenizer: Tokenizer) -> bool:
    record = ShardRecord.load(home, name)
    return record is not None and record.tokenizer_sha256 == tokenizer.sha256() and record.is_intact(home)


def _record(home: Path, name: str) -> ShardRecord:
    record = ShardRecord.load(home, name)
    if record is None:
        raise InfrastructureError(
            f"{home / name} was written on another node and is not here. "
            f"run.storage must be a folder that all nodes share."
        )
    return record


def _make(shards: dict[str, tuple[Span, ...]], home: Path, seq_len: int) -> None:
    """Make these shards, one Ray task each, as many at a time as there are CPUs."""
    import ray
    import ray.data

    if ray.cluster_resources().get("CPU", 0) < 1:
        raise InfrastructureError(
            "no node of the Ray cluster has a CPU to prepare data with: start one with --num-cpus 1."
        )
    names = list(shards)
    with _quiet_ray_data(), _nothing_left_behind():
        made = (
            ray.data.from_items([{"index": i} for i in range(len(names))], override_num_blocks=len(names))
            .map(_make_one, fn_kwargs={"plan": ray.put(list(shards.items())), "home": home, "seq_len": seq_len})
            .take_all()
        )
    for row in made:
        if row["fault"] == DataError.fault:
            raise DataError(row["problem"])
        if row["fault"]:
            raise InfrastructureError(row["problem"])


def _make_one(row: dict[str, Any], plan: Any, home: Path, seq_len: int) -> dict[str, str]:
    """In a Ray task: make one shard. A problem is returned, since Ray Data would rewrite the message of an error."""
    import ray

    name, spans = ray.get(plan)[row["index"]]
    try:
        write_shard(home, name, spans, Tokenizer.load(home / TOKENIZER_NAME), seq_len)
    except (DataError, InfrastructureError) as error:
        return {"fault": error.fault, "problem": str(error)}
    return {"fault": "", "problem": ""}


@contextmanager
def _nothing_left_behind() -> Iterator[None]:
    """Ray Data's helper actors outlive the job that used it first: end those that were not there before."""
    import ray
    from ray.exceptions import RayError

    def helpers() -> set[tuple[str, str]]:
        named = ray.util.list_named_actors(all_namespaces=True)
        return {(actor["namespace"], actor["name"]) for actor in named} & _RAY_DATA_HELPERS

    before = helpers()
    try:
        yield
    finally:
        with suppress(RayError, ValueError):
            for namespace, name in helpers() - before:
                ray.kill(ray.get_actor(name, namespace=namespace))


@contextmanager
def _quiet_ray_data() -> Iterator[None]:
    """Without Ray Data's progress bars and log lines; what goes wrong is raised."""
    from ray.data import DataContext

    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with DataContext.current(context):
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _alone(home: Path) -> Iterator[None]:
    """The folder, made if need be, for this process alone, without what a killed preparation left unfinished."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        lock = (home / ".lock").open("w")
    except OSError as error:
        raise InfrastructureError(
            f"can't write to {home}: {error.strerror}. Prepared data goes under run.storage: choose a folder that this "
            f"user may write to."
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log.warning("another process prepares the data in %s: waiting for it", home)
            fcntl.flock(lock, fcntl.LOCK_EX)
        for unfinished in home.glob(f".*{PASSING_SUFFIX}"):
            unfinished.unlink()
        yield
