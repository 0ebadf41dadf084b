"""Every command and every piece of Python in README.md and docs/ is run, or checked as far as it can be here.

What is in a fence without a language is shell, in one with `python` Python; anything else has to say that it is `text`.
Each command matches one of RULES, which says how it is run; one that matches none fails the test. All pages share one
folder and one tiny run, `quickstart`, which the commands of docs/first-run.md themselves make. 40 s on two cores.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from elastictrain import TrainConfig

ROOT = Path(__file__).parents[2]
IN_ORDER = ("first-run.md", "own-model.md", "own-data.md", "cluster.md", "node-dies.md", "report.md", "tuning.md")
FIRST = ROOT / "docs" / "first-run.md"
PATIENCE_S = 200

TINY = [
    f"data.corpus={Path(sysconfig.get_paths()['stdlib']) / 'json'}",
    *("data.validation_fraction=0.2", "data.validation_samples=8", "data.seq_len=32", "data.vocab_size=512"),
    *("data.num_shards=1", "model.hidden_size=32", "train.global_batch=4", "train.micro_batch=4"),
    *("train.warmup_steps=1", "train.sample_tokens=4", "elastic.max_workers=1", "elastic.standby=0"),
    *("cluster.local_nodes=1", "faults=[]"),
]
"""What makes a run take seconds: one worker, a small model, a few files."""
STEPS, MORE_STEPS = "train.steps=4", "train.steps=6"


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    page: str
    language: str
    text: str


@dataclass
class Workplace:
    """A folder that looks like the top of the repository, and what has been run in it."""

    folder: Path
    page: str = ""
    """Whose commands are run."""
    done: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Page and output by command: what another page has run already is not run again."""

    def shell(self, command: str) -> str:
        """What it prints; a command that fails fails the test."""
        if self.done.get(command, (self.page, ""))[0] == self.page:
            ended = subprocess.run(
                ["bash", "-c", command], cwd=self.folder, env=self._environment(), capture_output=True, text=True,
                timeout=PATIENCE_S, stdin=subprocess.DEVNULL,
            )  # fmt: skip
            assert ended.returncode == 0, f"{command}\n{ended.stdout}\n{ended.stderr}"
            self.done[command] = (self.page, ended.stdout)
        return self.done[command][1]

    def _environment(self) -> dict[str, str]:
        beside = str(Path(sys.executable).parent)
        own = {"PATH": os.pathsep.join([beside, os.environ["PATH"]]), "HOME": str(self.folder), "OMP_NUM_THREADS": "1"}
        own["PYTHONPATH"] = str(ROOT)
        return {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | own


How = Callable[[Workplace, str], None]


def as_written(place: Workplace, command: str) -> None:
    place.shell(command)


def with_(*words: str) -> How:
    """As written, and these words."""
    return lambda place, command: place.shell(shlex.join([*shlex.split(command), *words])) and None


def for_(**names: str) -> How:
    """As written, with something real where the page has a name for it."""

    def run(place: Workplace, command: str) -> None:
        for name, real in names.items():
            command = re.sub(rf"\b{name}\b", real, command)
        place.shell(command)

    return run


def dry(place: Workplace, command: str) -> None:
    """Config, overrides and all that they name are looked at; each kind of run has an integration test of its own."""
    # not beside the runs of other pages, whose configs these would not go on with
    elsewhere = f"run.storage={place.folder / 'never'}"
    place.shell(shlex.join([*shlex.split(command.partition(" > ")[0]), elsewhere, "--dry-run"]))


def from_the_exported(place: Workplace, command: str) -> None:
    """As `config_only`, with the model that the page has exported, which is for short texts."""
    config_only(place, f"{command.replace('FOLDER', str(place.folder / 'my-model'))} data.seq_len=16")


def config_only(place: Workplace, command: str) -> None:
    """What it is told would be understood; the scripts in jobs/ run in tests/integration/test_jobs.py."""
    words = shlex.split(command)
    script = words[words.index("python") + 1]
    assert (ROOT / script).is_file()
    overrides = [word for word in words if re.fullmatch(r"[a-z]+\.[a-z_]+=.*", word)]
    if "--model" in words:
        overrides.append(f"model.path={words[words.index('--model') + 1]}")
    TrainConfig.load(ROOT / words[words.index("--config") + 1], overrides)


def a_target(place: Workplace, command: str) -> None:
    """It is there; what it does is what CI does."""
    ended = subprocess.run(["make", "-n", *shlex.split(command)[1:]], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def a_benchmark(place: Workplace, command: str) -> None:
    """Its options are there; it takes minutes to hours, and tests/benchmarks/ has what can be tested of it."""
    script, *words = shlex.split(command)[1:]
    source = (ROOT / script).read_text()
    assert all(f'"{word}"' in source for word in words if word.startswith("--"))


def nothing(why: str) -> How:
    """Only that it is shell; `why` it is not run."""
    assert why
    return lambda place, command: None


def fresh_weights(place: Workplace, command: str) -> None:
    """In place of an export: weights that nobody trained. The run itself is tests/integration/test_run_own.py."""
    from safetensors.torch import save_file

    from elastictrain.workloads import build_workload

    to = place.folder / shlex.split(command)[-1]
    to.mkdir()
    config = TrainConfig.load(
        ROOT / "docs/examples/digits.yaml", [f"model.workload={ROOT}/docs/examples/digits.py:Digits"]
    )
    save_file(build_workload(config, 0).build(0).state_dict(), to / "model.safetensors")


RULES: list[tuple[str, How]] = [
    (r"elastictrain init \S+", as_written),
    (r"elastictrain train .* --dry-run", as_written),
    (r"elastictrain train first.yaml", with_(*TINY, STEPS)),
    (r"elastictrain train first.yaml train.steps=320", with_(*TINY, MORE_STEPS)),
    (
        r"elastictrain train \S+ .*checkpoint.signing_key_file=.*",
        nothing("the key would be in /etc; test_signature.py"),
    ),
    (r"elastictrain train [^&]*&?", dry),
    (r"elastictrain plan CONFIG .*", for_(CONFIG="jobs/llm_tiny.yaml")),
    (r"elastictrain plan [^<>|]*", as_written),
    (
        r"elastictrain (status|report|lineage|export|checkpoints) quickstart( --(verify|json|(html|to|svg) \S+))*",
        as_written,
    ),
    (r"elastictrain (top|runs|status|schema)( quickstart)?( --json)?", as_written),
    (r"elastictrain doctor", nothing("it tells of this machine; tests/cli/test_cli_doctor.py")),
    (r"elastictrain tune .*", nothing("it has integration tests of its own")),
    (r"elastictrain lineage tiny-sweep-1", nothing("beside a sweep; tests/integration/test_tune.py")),
    (r"elastictrain export digits --to \S+", fresh_weights),
    (r"elastictrain export finetuned --to \S+", nothing("tests/integration/test_jobs.py")),
    (
        r"elastictrain checkpoints quickstart .*--signing-key-file .*",
        nothing("the key would be in /etc; test_signature.py"),
    ),
    (r"elastictrain (top|report) node-dies", nothing("beside a run whose node is killed; tests/integration")),
    (r"python jobs/finetune_hf.py .* model.kind=transformer", from_the_exported),
    (r"python jobs/\w+.py .*", config_only),
    (r"ray job submit .* -- python jobs/\w+.py .*", config_only),
    (r"python -m elastictrain.tracking.(grafana|alerts)", as_written),
    (r"python benchmarks/\w+.py.*", a_benchmark),
    (r"make( \w+)?( ARGS=.*)?", a_target),
    (r"pip install -c constraints.txt \.", nothing("tests/test_wheel.py")),
    (r"source \.venv/bin/activate", nothing("the tests run in that environment")),
    (r"ray start --head", nothing("its ports may be taken; tests/integration/test_jobs.py starts one")),
    (r"clusters/local.sh (start|stop|kill).*", nothing("tests/clusters/test_local_script.py")),
    (r'eval "\$\(clusters/local.sh env\)"', nothing("tests/clusters/test_local_script.py")),
    (r"\(umask 077; openssl rand -hex 32 > /etc/elastictrain/key\)", nothing("it writes to /etc")),
]

PYTHON: list[tuple[str, Callable[[str], str]]] = [
    # the run that the commands made: it is complete, so that fit() has its result at once
    (
        r"ElasticTrainer\(TrainConfig\.load\(",
        lambda text: text.replace('["train.steps=50"]', repr([*TINY, MORE_STEPS])),
    ),
]
"""Where Python is run in another way than it is written."""


def pages() -> list[Path]:
    every = sorted((ROOT / "docs").rglob("*.md"))
    first = [ROOT / "docs" / name for name in IN_ORDER if (ROOT / "docs" / name).is_file()]
    return [*first, *(page for page in every if page not in first), ROOT / "README.md"]


def blocks(page: Path) -> Iterator[Block]:
    for language, text in re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S):
        yield Block(str(page.relative_to(ROOT)), language, text)


def commands(block: Block) -> list[str]:
    """Its lines as the shell reads them, without comments."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [re.sub(r"\s+", " ", re.sub(r"\s+# .*", "", line)).strip() for line in lines if line.strip()]


def rule(command: str) -> How | None:
    return next((how for pattern, how in RULES if re.fullmatch(pattern, command)), None)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """The folder after the first page: there is a run `quickstart`."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("jobs", "docs", "clusters", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    place = Workplace(folder)
    run(place, FIRST)
    return place


def run(place: Workplace, page: Path) -> None:
    """All of a page, in its order; its Python in one process."""
    python, place.page = "", page.name
    for block in blocks(page):
        if block.language == "python":
            text = block.text
            for pattern, change in PYTHON:
                text = change(text) if re.search(pattern, text) else text
            python += text
        elif not block.language:
            for command in commands(block):
                how = rule(command)
                assert how, f"{block.page}: no rule says how to run: {command}"
                how(place, command)
    if python:
        script = place.folder / f"{page.stem}.py"
        script.write_text(python)
        place.shell(f"python {script.name}")


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_every_fence_is_shell_python_or_said_to_be_text(page: Path) -> None:
    assert page.read_text(encoding="utf-8").count("```") == 2 * len(list(blocks(page)))
    for block in blocks(page):
        assert block.language in ("", "python", "text", "yaml"), block
        for command in commands(block) if not block.language else ():
            assert rule(command), f"{block.page}: no rule says how to run: {command}"
            syntax = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
            assert syntax.returncode == 0, syntax.stderr


@pytest.mark.parametrize("page", [page for page in pages() if page != FIRST], ids=lambda page: page.name)
def test_what_a_page_says_runs(place: Workplace, page: Path) -> None:
    run(place, page)


def test_the_first_page_makes_a_run_and_goes_on_with_it(place: Workplace) -> None:
    trained = [out for command, (_, out) in place.done.items() if "first.yaml" in command and TINY[0] in command]
    assert "The run was complete before: nothing to do." in trained[0], "the second time"
    assert "run quickstart goes on, attempt 2" in trained[1]
    assert json.loads(place.shell("elastictrain report quickstart --json"))["steps"] == 6
    assert (place.folder / "report.html").stat().st_size > 10_000


def test_the_example_on_the_page_is_the_file() -> None:
    shown = next(block.text for block in blocks(ROOT / "docs" / "own-model.md") if block.language == "python")
    assert shown in (ROOT / "docs" / "examples" / "digits.py").read_text()


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(found), f"{page.name} links to {target}"


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    assert [
        page.name for page in (ROOT / "docs").glob("*.md") if f"({page.name})" not in index and page.name != "README.md"
    ] == []


def anchors(page: Path) -> set[str]:
    """Of its headings, as they are made of them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
