"""A config says what is wrong with it in one message: what, the value, the knob, the way out."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml

from elastictrain.config import TrainConfig, blocking_changes
from elastictrain.errors import ConfigError

RECIPE = Path(__file__).parents[1] / "jobs" / "llm_tiny.yaml"


def refused(*overrides: str, path: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        TrainConfig.load(path, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.stpes=5", ["train.stpes", "did you mean train.steps?"]),
        ("trian.steps=5", ["trian", "did you mean train"]),
        ("steps=5", ["unknown key steps", "train.steps"]),
        ("elastic.max_worker=2", ["did you mean elastic.max_workers?"]),
        ("train.steps=many", ["train.steps", "'many'", "whole number"]),
        ("train.steps=0", ["train.steps", "at least 1"]),
        ("train.steps=1.5", ["train.steps", "1.5"]),
        ("train.steps=", ["train.steps", "None"]),
        ("train.activation_checkpointing=half", ["train.activation_checkpointing", "'half'", "'selective'"]),
        ("train.dtype=fp8", ["train.dtype", "'fp8'", "'bf16'"]),
        ("train=5", ["train", "5"]),
        ("parallel.zero_stage=4", ["parallel.zero_stage", "4"]),
        ("parallel.layout=best", ["parallel.layout", "'best'", "'manual'"]),
        ("parallel={layout: manual, pp: 2, zero_stage: 2}", ["parallel.zero_stage 2", "parallel.pp 2", "0 or 1"]),
        ("parallel={pp: 2, zero_stage: 3}", ["parallel.zero_stage 3", "parallel.pp 2"]),
        ("cluster.device_memory=much", ["cluster.device_memory", "much"]),
        ("parallel={layout: manual, pp: 2, zero_stage: 3}", ["parallel.zero_stage 3", "parallel.pp 2", "0 or 1"]),
        ("parallel={layout: manual, tp: 3}", ["parallel.tp 3", "4 heads", "divisor"]),
        ("parallel={layout: manual, ep: 2}", ["parallel.ep 2", "model.num_experts", "to 1"]),
        ("model.num_experts=1", ["model.num_experts", "1"]),
        ("model.experts_per_token=3", ["model.experts_per_token", "3"]),
        ("model.capacity_factor=0", ["model.capacity_factor", "0"]),
        ("parallel={layout: manual, pp: 8}", ["parallel.pp 8", "model.num_layers 4", "at most 4"]),
        ("parallel={layout: manual, pp: 4}", ["2 workers", "parallel.pp 4", "elastic.max_workers to 4"]),
        ("run.name=my run", ["run.name", "'my run'"]),
        ("run.name=../escape", ["run.name", "'../escape'"]),
        ("model.num_heads=3", ["model.hidden_size 128", "model.num_heads 3", "42.6667"]),
        ("model.num_kv_heads=3", ["model.num_kv_heads 3", "model.num_heads 4"]),
        ("model.kind=huggingface", ["model.path"]),
        ("elastic.min_workers=3", ["elastic.min_workers 3", "elastic.max_workers 2"]),
        ("data.vocab_size=100", ["data.vocab_size", "100"]),
        ("cluster.dashboard_port=80", ["cluster.dashboard_port", "80"]),
        ("faults=[{rank: 0}]", ["faults.0.at", "missing"]),
        ("faults=[{at: 1, knid: kill}]", ["faults.0.knid", "did you mean faults.0.kind?"]),
        ("faults=[{at: 1}, {at: 2, kind: maim}]", ["faults.1.kind", "'maim'", "'segfault'"]),
        ("faults=[{at: 1}, {at: -2, rank: x}]", ["faults.1.at", "-2", "faults.1.rank", "'x'"]),
        ("faults=kill", ["faults", "'kill'"]),
    ],
)
def test_a_bad_value_is_named_with_its_field_and_the_way_out(override: str, says: list[str]) -> None:
    message = refused(override)
    for part in says:
        assert part in message
    assert "\n" not in message
    assert "pydantic" not in message


@pytest.mark.parametrize(
    ("parallel", "dtype", "says"),
    [
        ({"ep": 2, "zero_stage": 3}, "fp32", ["parallel.zero_stage 3", "parallel.ep 2", "2 or less"]),
        ({"ep": 2, "zero_stage": 0}, "bf16", ["parallel.ep 2", "bf16", "to 1 or 2"]),
        ({"ep": 2, "pp": 2, "zero_stage": 2}, "fp32", ["parallel.zero_stage 2", "parallel.pp 2", "to 0 or 1"]),
        ({"ep": 3}, "fp32", ["parallel.ep 3", "model.num_experts 4", "divisor"]),
        ({"sp": 2}, "fp32", ["parallel.sp 2", "model.num_experts", "to 1"]),
    ],
)
def test_experts_are_shared_only_as_an_engine_can(parallel: dict[str, Any], dtype: str, says: list[str]) -> None:
    data = {"model": {"num_experts": 4}, "parallel": parallel, "train": {"dtype": dtype}, "elastic": {"max_workers": 4}}
    with pytest.raises(ConfigError) as refused:
        TrainConfig.from_dict(data)
    for part in says:
        assert part in str(refused.value)


def test_all_that_is_wrong_is_said_at_once() -> None:
    message = refused("train.steps=0", "train.learning_rate=-1", "snapshot.every=0")
    assert "train.steps" in message
    assert "train.learning_rate" in message
    assert "snapshot.every" in message


@pytest.mark.parametrize("override", ["train.steps", "=5", "train.=5", "Train Steps=5", "--steps=5", "train..steps=5"])
def test_what_is_no_override_is_refused_with_an_example(override: str) -> None:
    assert "train.steps=50" in refused(override)


def test_an_override_may_not_reach_into_a_value() -> None:
    message = refused("train.steps=5", "train.steps.more=1")
    assert "train.steps.more=1" in message
    assert "steps is not a section" in message


def test_an_override_with_broken_yaml_is_quoted() -> None:
    assert "faults=[{at: 1" in refused("faults=[{at: 1")


def test_a_world_that_can_not_share_a_step_is_refused_with_the_arithmetic() -> None:
    message = refused("elastic.max_workers=3")
    assert "train.global_batch 16 / train.micro_batch 4 = 4 micro-batches" in message
    assert "4 / 3" in message
    assert "Legal world sizes are 1, 2, 4" in message


def test_a_batch_that_is_no_whole_number_of_micro_batches_is_refused() -> None:
    message = refused("train.micro_batch=5")
    assert "16 / train.micro_batch 5 = 3.2" in message
    assert "multiple of 5" in message


def test_a_missing_file_is_named_with_the_near_one(tmp_path: Path) -> None:
    (tmp_path / "llm_tiny.yaml").write_text("")
    message = refused(path=tmp_path / "llm_tny.yaml")
    assert "llm_tny.yaml" in message
    assert f"Did you mean {tmp_path / 'llm_tiny.yaml'}?" in message


def test_a_folder_is_no_config(tmp_path: Path) -> None:
    assert "Is a directory" in refused(path=tmp_path)


@pytest.mark.parametrize("text", ["train: [", "train:\n\t- x", "a: b: c"])
def test_broken_yaml_is_named_with_its_file(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, text)
    assert f"{path} is not valid YAML" in refused(path=path)


def test_a_field_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("train:\n  steps: 5\n  seed: 1\n  steps: 7\n")
    assert "not valid YAML" in refused(path=written(tmp_path, "? [train, model]\n: 5\n"))
    with pytest.raises(ConfigError, match=r"(?s)twice\.yaml is not valid YAML: steps is there twice.*line 4"):
        TrainConfig.load(path)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert "not valid YAML" in refused(path=path)


@pytest.mark.parametrize("text", ["- train", "just text", "5"])
def test_a_file_without_sections_is_refused(tmp_path: Path, text: str) -> None:
    assert "sections such as `train:`" in refused(path=written(tmp_path, text))


def test_a_typo_in_a_file_names_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "elastic:\n  stanby: 1\n")
    message = refused(path=path)
    assert str(path) in message
    assert "did you mean elastic.standby?" in message


def test_yaml_can_not_make_objects(tmp_path: Path) -> None:
    path = written(tmp_path, "run: !!python/object/apply:os.system ['true']\n")
    assert "not valid YAML" in refused(path=path)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is empty: write sections"):
        TrainConfig.load(written(tmp_path, ""))


def test_overrides_apply_left_to_right_over_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "train: {steps: 10, seed: 3}\n")
    config = TrainConfig.load(path, ["train.steps=20", "train.steps=30"])
    assert (config.train.steps, config.train.seed) == (30, 3)


def test_an_override_reads_numbers_as_people_write_them() -> None:
    config = TrainConfig.load(None, ["train.learning_rate=1e-3", "model.num_kv_heads=null", "faults=[]"])
    assert config.train.learning_rate == 1e-3
    assert config.model.num_kv_heads is None
    assert config.faults == ()


def test_an_override_can_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "faults.yaml"
    path.write_text("- {at: 3, rank: 1}\n")
    assert TrainConfig.load(None, [f"faults=@{path}"]).faults[0].at == 3
    assert str(tmp_path / "none.yaml") in refused(f"faults=@{tmp_path / 'none.yaml'}")


def test_errors_survive_pickling() -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig.load(None, ["train.stpes=5"])
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # noqa: S301 - our own bytes


def test_a_config_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        TrainConfig().train.steps = 5  # type: ignore[misc]  # frozen: that is the test


def test_the_recipe_round_trips_through_its_resolved_yaml(tmp_path: Path) -> None:
    config = TrainConfig.load(RECIPE)
    assert TrainConfig.load(written(tmp_path, config.to_yaml())) == config
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_the_recipe_is_the_demo() -> None:
    config = TrainConfig.load(RECIPE)
    (fault,) = config.faults
    assert config.run.name == "quickstart"
    assert (config.elastic.max_workers, config.elastic.standby, config.cluster.local_nodes) == (2, 1, 2)
    assert (fault.kind, fault.at) == ("kill", config.train.steps // 2)


def test_a_run_may_go_on_elsewhere_and_longer_but_not_as_another_model() -> None:
    old = TrainConfig()
    more = [
        "train.steps=999",
        "train.micro_batch=2",
        "parallel.layout=manual",
        "parallel.pp=2",
        "elastic.max_workers=4",
        "faults=[{at: 1}]",
    ]
    assert blocking_changes(old, TrainConfig.load(None, [*more, "checkpoint.every=7", "cluster.local_nodes=1"])) == []
    other = TrainConfig.load(None, ["train.global_batch=32", "model.hidden_size=64", "train.seed=1"])
    assert blocking_changes(old, other) == [
        ("model.hidden_size", 128, 64),
        ("train.global_batch", 16, 32),
        ("train.seed", 0, 1),
    ]


def test_the_schema_documents_every_field() -> None:
    schema = TrainConfig.model_json_schema()
    for name, section in [("TrainConfig", schema), *schema["$defs"].items()]:
        assert section["additionalProperties"] is False
        assert section["description"]
        for field, entry in section["properties"].items():
            assert entry.get("description") or "$ref" in entry, f"{name}.{field} has no description"


def test_dumping_keeps_the_order_of_the_sections() -> None:
    assert list(yaml.safe_load(TrainConfig().to_yaml())) == list(TrainConfig.model_fields)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("faults=5", "faults = 5: must be a list"),
        ("faults=[kill]", "faults.0 = 'kill': must be a section of fields, such as {at: 50, rank: 1, kind: kill}"),
        ("faults=[{rank: 1}]", "faults.0.at is missing"),
        ("faults=[{at: 0}]", "faults.0.at = 0: must be at least 1"),
        ("faults=[{at: 3, kind: boom}]", "faults.0.kind = 'boom': must be 'kill', 'segfault', "),
        ("train.steps=abc", "train.steps = 'abc': must be a whole number"),
        ("train.beta1=1", "train.beta1 = 1: must be less than 1"),
        ("elastic=3", "elastic = 3: must be a section of fields"),
    ],
)
def test_wrong_values_are_told_in_plain_words(override: str, says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        TrainConfig.load(None, [override])
    assert says in str(raised.value)
    assert "Input" not in str(raised.value)


def test_faults_after_the_last_step_are_known() -> None:
    config = TrainConfig.load(None, ["train.steps=50", "faults=[{at: 50}, {at: 51, kind: stop}]"])
    assert [(number, fault.at) for number, fault in config.late_faults()] == [(1, 51)]


def test_a_fault_that_can_never_strike_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"faults\.0\.rank 7 .* highest rank is 1"):
        TrainConfig.load(None, ["faults=[{at: 3, rank: 7}]"])


@pytest.mark.parametrize(
    ("written", "means"),
    [("none", "none"), ("selective", "selective"), ("full", "full"), ("false", "none"), ("true", "full")],
)
def test_what_is_recomputed_may_be_said_in_two_ways(written: str, means: str) -> None:
    config = TrainConfig.load(None, [f"train.activation_checkpointing={written}"])
    assert config.train.activation_checkpointing == config.layout(1).recompute == means
    assert TrainConfig.from_dict(config.to_dict()) == config
    if means != "none":
        assert str(config.layout(1)).split()[-1] == {"selective": "recompute-selective", "full": "recompute"}[means]
