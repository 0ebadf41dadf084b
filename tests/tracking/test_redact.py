"""No secret that a run is given reaches its journal, its report, MLflow, or the folder in its storage."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from example_events import full_story

from elastictrain.cli.outcome import plain_errors
from elastictrain.config import TrainConfig
from elastictrain.errors import RunConflictError, UserCodeError
from elastictrain.events import Cause, FailureDetected, RunEnded, RunStarted, StepCommitted, Warned
from elastictrain.runtime.environment import environment
from elastictrain.runtime.home import RunHome
from elastictrain.tracking.exact_json import dumps
from elastictrain.tracking.html import render_html
from elastictrain.tracking.journal import Journal, read_journal
from elastictrain.tracking.lineage import Lineage
from elastictrain.tracking.redact import redact, redact_all, redact_command, redact_event, secret_values
from elastictrain.tracking.report import build_report

SECRET = "hunter2-hunter2"
URI = f"https://me:{SECRET}@mlflow.example:5000"
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HF_TOKEN": "hf_0123456789", "AWS_SECRET_ACCESS_KEY": "AKsecretkey/123"}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (URI, "https://***@mlflow.example:5000"),
        ("s3://key:a/b@bucket/x", "s3://key:a/b@bucket/x"),  # no URI: the / would have to be %2F
        ("s3://key:a%2Fb@bucket/x?region=eu&secret_key=5", "s3://***@bucket/x?region=eu&secret_key=***"),
        ("at 'postgresql://u:p@ss@host/db'.", "at 'postgresql://***@host/db'."),
        ("https://h/x?X-Amz-Signature=ab12&n=1", "https://h/x?X-Amz-Signature=***&n=1"),
        ("MLFLOW_TRACKING_PASSWORD=abc python job.py", "MLFLOW_TRACKING_PASSWORD=*** python job.py"),
        ("password='a b', n=1", "password=***, n=1"),
        ("{'api_key': 'abc', 'n': 1}", "{'api_key': '***', 'n': 1}"),
        ('{"hf.token" : "abc"}', '{"hf.token" : "***"}'),
        ("Authorization: Bearer abcdef0123456789abcdef", "Authorization: Bearer ***"),
    ],
)
def test_a_secret_is_known_by_its_place_or_name(text: str, told: str) -> None:
    assert redact(text) == told
    assert redact(told) == told


@pytest.mark.parametrize(
    "text",
    [
        "train.sample_tokens=64 num_tokens=2048 tokens/s",
        "checkpoint.signing_key_file=/etc/key",
        "unexpected token: 'x' at key=value",
        "see https://example.org/a?page=2, me@example.org",
        "basic training, bearer of news",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text, secret_values({"TOKENIZERS_PARALLELISM": "false", "PASSWORD": "a"})) == text


def test_what_has_a_secret_name_is_hidden_whole() -> None:
    data = {"a": [{"password": "x", "n": 1, "num_tokens": 5}], "token": "", "secret": None, "auth_token": "y"}
    hidden = {"a": [{"password": "***", "n": 1, "num_tokens": 5}], "token": "", "secret": None, "auth_token": "***"}
    assert redact_all(data) == hidden


def test_a_config_without_secrets_is_told_as_it_is() -> None:
    config = TrainConfig.load(None, ["checkpoint.signing_key_file=/etc/elastictrain/key"]).to_dict()
    assert redact_all(config) == config


def test_secrets_that_the_process_was_given_are_known_by_value() -> None:
    values = secret_values(ENVIRONMENT, URI, None, "s3://k:abc%2Fdefgh@bucket")
    assert set(values) == {"hf_0123456789", "AKsecretkey/123", SECRET, "abc%2Fdefgh", "abc/defgh"}
    text = f"403 for hf_0123456789; {SECRET}; abc/defgh"
    assert redact(text, values) == "403 for ***; ***; ***"


def test_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["job.py", "--password", SECRET, "-x", f"tracking.uri={URI}", f"--token={SECRET}", "train.steps=5"]
    told = "job.py --password *** -x tracking.uri=https://***@mlflow.example:5000 --token=*** train.steps=5"
    assert redact_command(arguments) == told
    monkeypatch.setattr(sys, "argv", arguments)
    assert environment()["command"] == told


def secret_run() -> list:
    """The events of a run that comes across its secrets wherever it can."""
    story = full_story()
    start = story.events[0]
    assert isinstance(start, RunStarted)
    config = TrainConfig.load(
        None, [f"tracking.uri={URI}", f"run.storage=s3://AKIA:{SECRET}@bucket/runs", "train.steps=4"]
    )
    told = {**start.environment, "command": f"train tracking.uri={URI}", "HF_TOKEN": ENVIRONMENT["HF_TOKEN"]}
    cause = Cause("exception", f"OSError: {URI}", f"line 1\nOSError: {SECRET}, {ENVIRONMENT['HF_TOKEN']}", "OSError")
    events = [replace(e, cause=cause) if isinstance(e, FailureDetected) else e for e in story.events]
    events[0] = replace(start, config=config.to_dict(), environment=told)
    end = events[-1]
    assert isinstance(end, RunEnded)
    events[-1:] = [Warned(end.at, "storage", f"403: {ENVIRONMENT['AWS_SECRET_ACCESS_KEY']}"), replace(end, cause=cause)]
    values = secret_values(ENVIRONMENT, config.run.storage, config.tracking.uri)
    return [redact_event(event, values) for event in events]


def no_secret_in(text: str) -> None:
    for secret in (SECRET, "AKIA", *(v for k, v in ENVIRONMENT.items() if k != "PATH")):
        assert secret not in text


def test_no_secret_reaches_journal_report_or_mlflow(tmp_path: Path) -> None:
    events = secret_run()
    journal = Journal(tmp_path, 1)
    for event in events:
        journal.append(event)
    journal.close()
    no_secret_in(journal.path.read_text())
    assert read_journal(tmp_path) == events
    report = build_report(events)
    no_secret_in(dumps(report))
    no_secret_in(render_html(report))
    batch = Lineage(lambda: events).add(events)
    no_secret_in(json.dumps(asdict(batch), default=str))
    assert batch.params[0]["tracking.uri"] == "https://***@mlflow.example:5000"


def test_what_holds_no_secret_is_the_same_object() -> None:
    for event in full_story().events:
        if isinstance(event, StepCommitted):
            assert redact_event(event, ("2",)) is event
        elif not isinstance(event, Warned):
            assert redact_event(event) is event


def test_the_folder_in_the_storage_has_no_password_and_another_one_blocks_nothing(tmp_path: Path) -> None:
    def home(uri: str, seed: int = 0) -> RunHome:
        return RunHome(
            TrainConfig.load(
                None, [f"run.storage={tmp_path}", "run.name=demo", f"tracking.uri={uri}", f"train.seed={seed}"]
            )
        )

    home(URI).check_config(begun=False)
    no_secret_in((tmp_path / "demo" / "config.json").read_text())
    home(URI).check_config(begun=True)
    home(URI.replace(SECRET, "changed")).check_config(begun=True)
    with pytest.raises(RunConflictError, match=r"train\.seed"):
        home(URI, seed=1).check_config(begun=True)


def test_errors_on_the_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_TOKEN", ENVIRONMENT["HF_TOKEN"])
    for debug in (False, True):
        with pytest.raises(SystemExit), plain_errors(debug):
            raise UserCodeError(f"OSError: {URI} refused {ENVIRONMENT['HF_TOKEN']}")
        told = capsys.readouterr().err
        assert "error: OSError: https://***@mlflow.example:5000 refused ***" in told
        no_secret_in(told)
