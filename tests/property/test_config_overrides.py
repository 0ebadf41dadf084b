"""Whatever legal values a config is given, writing it down and reading it again gives the same config."""

import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from elastictrain.config import TrainConfig, blocking_changes

values = st.fixed_dictionaries(
    {},
    optional={
        "run.name": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True),
        "run.storage": st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=20),
        "train.steps": st.integers(1, 10**9),
        "train.seed": st.integers(0, 2**63),
        "train.learning_rate": st.floats(0, 1e3, exclude_min=True, allow_nan=False),
        "train.dtype": st.sampled_from(["fp32", "bf16"]),
        "train.sample_prompt": st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=20),
        "model.num_kv_heads": st.sampled_from([None, 1, 2, 4]),
        "parallel.zero_stage": st.integers(0, 3),
        "elastic.gpus_per_worker": st.none() | st.floats(0, 8),
        "data.suffixes": st.lists(st.text("abc.", min_size=1), max_size=3),
        "faults": st.lists(
            st.fixed_dictionaries(
                {"at": st.integers(1, 10**6)},
                optional={
                    "rank": st.integers(0, 1),  # with the default of two workers
                    "kind": st.sampled_from(["kill", "exit"]),
                    "repeat": st.booleans(),
                },
            ),
            max_size=3,
        ),
    },
)


def override(key: str, value: object) -> str:
    return f"{key}={yaml.safe_dump(value, default_flow_style=True, width=10**9)}"


@example({"run.storage": "0E0"})
@example({"train.sample_prompt": "\x85"})
@given(values)
def test_overrides_arrive_as_written(chosen: dict[str, object]) -> None:
    written = {k: v for k, v in chosen.items() if not (isinstance(v, str) and v.startswith("@"))}
    data = TrainConfig.load(None, [override(k, v) for k, v in written.items()]).to_dict()
    for key, value in written.items():
        section, _, field = key.partition(".")
        found = data[section][field] if field else data[section]
        if isinstance(value, list) and key == "faults":
            assert [{k: f[k] for k in want} for f, want in zip(found, value, strict=True)] == value
        else:
            assert found == value


@example({"run.storage": "0E0"})
@given(values)
def test_the_resolved_config_is_itself_again(chosen: dict[str, object]) -> None:
    config = TrainConfig.load(None, [override(k, v) for k, v in chosen.items() if not str(v).startswith("@")])
    assert TrainConfig.from_dict(yaml.safe_load(config.to_yaml())) == config
    assert blocking_changes(config, TrainConfig.from_dict(config.to_dict())) == []
