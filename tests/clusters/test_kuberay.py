"""The manifests for Kubernetes: their fields, and what makes a pod that is taken away cost no step."""

from __future__ import annotations

import copy
import os
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from files import CLUSTERS, manifest, manifests
from kuberay_fields import KINDS

from elastictrain.config import TrainConfig
from elastictrain.version import __version__

DOCUMENTS = [
    pytest.param(document, id=f"{path.stem}-{document['kind']}")
    for path in sorted((CLUSTERS / "kuberay").glob("*.yaml"))
    for document in manifests(f"kuberay/{path.name}")
]
ROOT = CLUSTERS.parent


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_field_is_one_that_kubernetes_knows(document: dict[str, Any]) -> None:
    validator = jsonschema.Draft202012Validator(KINDS[document["kind"]])
    assert [f"{e.json_path}: {e.message}" for e in validator.iter_errors(document)] == []


@pytest.mark.skipif("KUBERAY_CRDS" not in os.environ, reason="KUBERAY_CRDS names no folder with KubeRay's definitions")
@pytest.mark.parametrize("kind", ["RayCluster", "RayJob"])
def test_kuberays_own_definition(kind: str) -> None:
    definition = Path(os.environ["KUBERAY_CRDS"]) / f"ray.io_{kind.lower()}s.yaml"
    versions = yaml.load(definition.read_text(), yaml.CSafeLoader)["spec"]["versions"]
    [schema] = [v["schema"]["openAPIV3Schema"] for v in versions if v["name"] == "v1"]
    schema["properties"]["metadata"] = {"type": "object"}  # Kubernetes' own, not in the definition
    close(schema)
    document = manifest(f"kuberay/{kind.lower()}.yaml")
    validator = jsonschema.Draft202012Validator(schema)
    assert [f"{e.json_path}: {e.message}" for e in validator.iter_errors(document)] == []
    wrong = copy.deepcopy(document)
    cluster_of(wrong)["workerGroupSpecs"][0]["template"]["spec"]["tolerations"][0]["efect"] = "NoSchedule"
    assert any("efect" in e.message for e in validator.iter_errors(wrong))


def close(schema: Any) -> None:
    """An unknown field is an error, as it is with `kubectl apply --validate=strict`."""
    if isinstance(schema, dict):
        if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema.setdefault("additionalProperties", False)
        for part in schema.values():
            close(part)


def cluster_of(document: dict[str, Any]) -> dict[str, Any]:
    spec = document["spec"]
    return dict(spec.get("rayClusterSpec", spec))


@pytest.fixture(params=["raycluster", "rayjob"])
def cluster(request: pytest.FixtureRequest) -> dict[str, Any]:
    return cluster_of(manifest(f"kuberay/{request.param}.yaml"))


def worker(cluster: dict[str, Any]) -> dict[str, Any]:
    [group] = cluster["workerGroupSpecs"]
    return dict(group["template"]["spec"])


def test_both_make_the_same_cluster() -> None:
    assert cluster_of(manifest("kuberay/raycluster.yaml")) == cluster_of(manifest("kuberay/rayjob.yaml"))


def test_the_image_has_this_version(cluster: dict[str, Any]) -> None:
    assert cluster["rayVersion"] == ray.__version__
    for pod in (cluster["headGroupSpec"]["template"]["spec"], worker(cluster)):
        assert pod["containers"][0]["image"].endswith(f"/elastictrain:{__version__}")


def test_workers_are_spot_and_the_head_is_not(cluster: dict[str, Any]) -> None:
    head, pod = cluster["headGroupSpec"]["template"]["spec"], worker(cluster)
    assert "nodeSelector" not in head
    assert "tolerations" not in head
    [(key, value)] = pod["nodeSelector"].items()
    assert {"key": key, "operator": "Equal", "value": value, "effect": "NoSchedule"} in pod["tolerations"]


def test_a_pod_that_is_taken_away_has_left_before_it_is_killed(cluster: dict[str, Any]) -> None:
    pod = worker(cluster)
    [container] = pod["containers"]
    command = container["lifecycle"]["preStop"]["exec"]["command"]
    drained_s = int(command[command.index("--seconds") + 1])
    assert command[2] == "now"
    assert drained_s + 5 <= pod["terminationGracePeriodSeconds"]
    assert settled("rayjob").elastic.preempt_grace_s == drained_s, "a SIGTERM gives a worker as long as a drained node"


def test_shared_memory_is_memory_that_the_pod_has(cluster: dict[str, Any]) -> None:
    for pod in (cluster["headGroupSpec"]["template"]["spec"], worker(cluster)):
        [container] = pod["containers"]
        [mount] = [m for m in container["volumeMounts"] if m["mountPath"] == "/dev/shm"]
        [volume] = [v for v in pod["volumes"] if v["name"] == mount["name"]]
        assert volume["emptyDir"]["medium"] == "Memory"
        shared, limit = (int(x.removesuffix("Gi")) for x in (
            volume["emptyDir"]["sizeLimit"], container["resources"]["limits"]["memory"]
        ))  # fmt: skip
        assert shared <= limit / 2, "the rest is for the workers and for the keepers' copies of the state"
        assert container["resources"]["limits"] == container["resources"]["requests"]


def test_token_tls_and_no_root(cluster: dict[str, Any]) -> None:
    assert cluster["authOptions"]["mode"] == "token"
    assert cluster["authOptions"]["secretName"]
    assert cluster["tlsOptions"] == {"enabled": True}
    for pod in (cluster["headGroupSpec"]["template"]["spec"], worker(cluster)):
        assert pod["securityContext"]["runAsNonRoot"]
        assert not pod["automountServiceAccountToken"]
        assert not pod["containers"][0]["securityContext"]["allowPrivilegeEscalation"]
    assert not any(d.values[0]["kind"] == "Secret" for d in DOCUMENTS), "a token is made, not committed"


def test_the_run_lives_on_the_volume_that_all_pods_share(cluster: dict[str, Any]) -> None:
    claim, policy = manifests("kuberay/storage.yaml")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    covered = policy["spec"]["podSelector"]["matchLabels"].items()
    storage = settled("rayjob").run.storage
    for template in (cluster["headGroupSpec"]["template"], cluster["workerGroupSpecs"][0]["template"]):
        assert covered <= template["metadata"]["labels"].items()
        pod = template["spec"]
        [mount] = [m for m in pod["containers"][0]["volumeMounts"] if m["mountPath"] == storage]
        [volume] = [v for v in pod["volumes"] if v["name"] == mount["name"]]
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


def settled(name: str) -> TrainConfig:
    """The config that the manifest's command makes."""
    words = shlex.split(manifest(f"kuberay/{name}.yaml")["spec"]["entrypoint"])
    assert words[:2] == ["elastictrain", "train"]
    return TrainConfig.load(ROOT / words[2].removeprefix("/opt/elastictrain/"), words[3:])
