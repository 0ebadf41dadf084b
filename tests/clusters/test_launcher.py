"""aws.yaml and gcp.yaml, as `ray up` reads them: filled with Ray's defaults, then held against Ray's own schema."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import jsonschema
import pytest
from files import manifest
from ray.autoscaler._private.util import prepare_config, validate_config

CLOUDS = ["aws", "gcp"]


@pytest.fixture(params=CLOUDS)
def cloud(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def config(cloud: str) -> dict[str, Any]:
    return dict(prepare_config(manifest(f"{cloud}.yaml")))


def test_ray_takes_it(config: dict[str, Any]) -> None:
    validate_config(config)
    wrong = copy.deepcopy(config)
    wrong["available_node_types"]["spot"]["maximum_workers"] = 3
    with pytest.raises(jsonschema.ValidationError, match="maximum_workers"):
        validate_config(wrong)


def is_spot(node_type: dict[str, Any]) -> bool:
    node = node_type["node_config"]
    aws = node.get("InstanceMarketOptions", {}).get("MarketType") == "spot"
    return aws or node.get("scheduling", {}).get("provisioningModel") == "SPOT"


def test_workers_are_spot_and_the_head_is_not(config: dict[str, Any]) -> None:
    types = config["available_node_types"]
    assert {name: is_spot(kind) for name, kind in types.items()} == {"head": False, "spot": True}
    assert config["head_node_type"] == "head"
    assert types["head"]["resources"]["CPU"] == 0, "a rank on the head would end with no notice when it is rebuilt"
    assert types["spot"]["max_workers"] <= config["max_workers"]


def test_token_and_tls_are_on_in_every_process(config: dict[str, Any]) -> None:
    words = " ".join(config["docker"]["run_options"]).split()
    environment = dict(b.split("=", 1) for a, b in pairwise(words) if a == "--env")
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_USE_TLS"] == "1"
    home = "/home/trainer"
    mounted = {path.replace("~", home) for path in config["file_mounts"]}
    assert f"{home}/.ray/auth_token" in mounted
    assert environment["RAY_TLS_CA_CERT"].rpartition("/")[0] in mounted
    for start in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        [made] = [n for n, line in enumerate(start) if "tls.sh node ~/.elastictrain/authority ~/tls" in line]
        [begun] = [n for n, line in enumerate(start) if "ray start" in line]
        assert made < begun
    assert environment["RAY_TLS_SERVER_CERT"] == f"{home}/tls/node.crt"
    assert environment["RAY_TLS_SERVER_KEY"] == f"{home}/tls/node.key"


def test_nothing_listens_to_the_world(config: dict[str, Any]) -> None:
    [head] = [line for line in config["head_start_ray_commands"] if "ray start" in line]
    assert "--dashboard-host=127.0.0.1" in head


def test_a_spot_machine_hands_its_notice_on(config: dict[str, Any], cloud: str) -> None:
    notice = f"drain_node.py {cloud} "
    assert notice in config["worker_start_ray_commands"][-1]
    assert not any("drain_node" in line for line in config["head_start_ray_commands"])


def test_ray_installs_nothing_over_the_image(config: dict[str, Any]) -> None:
    assert not any("ray" in line for line in config["setup_commands"] + config["worker_setup_commands"])
