"""The fields of KubeRay's and Kubernetes' objects that the manifests use, as JSON schemas that allow no other.

Written from the published names and types: ray.io/v1 of KubeRay 1.7, core/v1, networking.k8s.io/v1. KubeRay's full
definitions are some megabytes; KUBERAY_CRDS=FOLDER has test_kuberay.py use those too (see clusters/README.md).
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

STRING: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
FLAG: Schema = {"type": "boolean"}
STRINGS: Schema = {"type": "object", "additionalProperties": STRING}
QUANTITY: Schema = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|Ki|Mi|Gi|Ti)?$"}
PATH: Schema = {"type": "string", "pattern": "^/"}


def closed(required: str = "", **properties: Schema) -> Schema:
    return {
        "type": "object", "required": required.split(), "properties": properties, "additionalProperties": False,
    }  # fmt: skip


def each(items: Schema) -> Schema:
    return {"type": "array", "items": items, "minItems": 1}


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


def whole(version: str, kind: str, spec: Schema) -> Schema:
    metadata = closed("name", name=STRING, labels=STRINGS)
    return closed(
        "apiVersion kind metadata spec", apiVersion=one_of(version), kind=one_of(kind), metadata=metadata, spec=spec
    )


AMOUNTS: Schema = {"type": "object", "additionalProperties": QUANTITY}
SELECTOR = closed(
    matchLabels=STRINGS,
    matchExpressions=each(closed("key operator", key=STRING, operator=one_of("In", "NotIn", "Exists", "DoesNotExist"))),
)
VOLUME = closed(
    "name",
    name=STRING,
    emptyDir=closed(medium=one_of("Memory"), sizeLimit=QUANTITY),
    persistentVolumeClaim=closed("claimName", claimName=STRING, readOnly=FLAG),
)
CONTAINER = closed(
    "name image resources",
    name=STRING,
    image=STRING,
    securityContext=closed(allowPrivilegeEscalation=FLAG, capabilities=closed(drop=each(STRING), add=each(STRING))),
    ports=each(closed("containerPort", name={"type": "string", "maxLength": 15}, containerPort=COUNT)),
    lifecycle=closed(preStop=closed(exec=closed("command", command=each(STRING)))),
    resources=closed("requests limits", requests=AMOUNTS, limits=AMOUNTS),
    volumeMounts=each(closed("name mountPath", name=STRING, mountPath=PATH, readOnly=FLAG)),
)
POD = closed(
    "containers",
    automountServiceAccountToken=FLAG,
    securityContext=closed(
        runAsNonRoot=FLAG,
        runAsUser=COUNT,
        runAsGroup=COUNT,
        fsGroup=COUNT,
        seccompProfile=closed("type", type=one_of("RuntimeDefault", "Localhost", "Unconfined")),
    ),
    nodeSelector=STRINGS,
    tolerations=each(
        closed(
            key=STRING,
            operator=one_of("Equal", "Exists"),
            value=STRING,
            effect=one_of("NoSchedule", "PreferNoSchedule", "NoExecute"),
        )
    ),
    terminationGracePeriodSeconds=COUNT,
    containers=each(CONTAINER),
    volumes=each(VOLUME),
)
TEMPLATE = closed("spec", metadata=closed(labels=STRINGS), spec=POD)
CLUSTER = closed(
    "headGroupSpec",
    rayVersion=STRING,
    authOptions=closed(mode=one_of("disabled", "token"), secretName=STRING),
    tlsOptions=closed(enabled=FLAG),
    headGroupSpec=closed("template", rayStartParams=STRINGS, template=TEMPLATE),
    workerGroupSpecs=each(
        closed(
            "groupName template",
            groupName=STRING,
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            rayStartParams=STRINGS,
            template=TEMPLATE,
        )
    ),
)
KINDS: dict[str, Schema] = {
    "RayCluster": whole("ray.io/v1", "RayCluster", CLUSTER),
    "RayJob": whole(
        "ray.io/v1",
        "RayJob",
        closed(
            entrypoint=STRING,
            backoffLimit=COUNT,
            shutdownAfterJobFinishes=FLAG,
            ttlSecondsAfterFinished=COUNT,
            rayClusterSpec=CLUSTER,
        ),
    ),
    "PersistentVolumeClaim": whole(
        "v1",
        "PersistentVolumeClaim",
        closed(
            "accessModes resources",
            accessModes=each(one_of("ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod")),
            storageClassName=STRING,
            resources=closed("requests", requests=AMOUNTS),
        ),
    ),
    "NetworkPolicy": whole(
        "networking.k8s.io/v1",
        "NetworkPolicy",
        closed(
            "podSelector",
            podSelector=SELECTOR,
            policyTypes=each(one_of("Ingress", "Egress")),
            ingress=each(
                closed(
                    **{"from": each(closed(podSelector=SELECTOR, namespaceSelector=SELECTOR))},
                    ports=each(closed(port=COUNT)),
                )
            ),
        ),
    ),
}
