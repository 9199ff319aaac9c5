"""The structure of KubeRay's objects, as far as our manifests use it, to be checked without a Kubernetes.

Written from KubeRay's API reference (v1.6, https://docs.ray.io/en/latest/cluster/kubernetes/references/api.html:
RayJobSpec, RayClusterSpec, HeadGroupSpec, WorkerGroupSpec and AuthOptions with their types) and Kubernetes'
own (PodSpec, Container, Volume). Fields that those have and we do not use are left out, so that a
misspelt one is refused.
"""

from __future__ import annotations

Schema = dict[str, object]

TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
DNS_LABEL: Schema = {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 47}
"""KubeRay's own limit for the names of a RayJob and a RayCluster, which become parts of longer ones."""
TEXTS: Schema = {"type": "object", "additionalProperties": TEXT}
QUANTITY: Schema = {"type": "string", "pattern": "^[0-9]+(m|Ki|Mi|Gi|Ti)?$"}


def fields(required: dict[str, Schema], optional: dict[str, Schema] | None = None) -> Schema:
    return {
        "type": "object",
        "properties": {**required, **(optional or {})},
        "required": list(required),
        "additionalProperties": False,
    }


def every(schema: Schema, at_least: int = 1) -> Schema:
    return {"type": "array", "items": schema, "minItems": at_least}


AMOUNTS: Schema = {"type": "object", "additionalProperties": QUANTITY, "required": ["cpu", "memory"]}
CONTAINER = fields(
    {"name": DNS_LABEL, "image": TEXT},
    {
        "resources": fields({"requests": AMOUNTS, "limits": AMOUNTS}),
        "ports": every(fields({"containerPort": COUNT}, {"name": {"type": "string", "maxLength": 15}})),
        "envFrom": every(fields({"secretRef": fields({"name": TEXT})})),
        "volumeMounts": every(
            fields({"name": DNS_LABEL, "mountPath": TEXT}, {"readOnly": {"type": "boolean"}})
        ),
    },
)
VOLUME = fields(
    {"name": DNS_LABEL},
    {
        "emptyDir": fields({}, {"medium": {"enum": ["", "Memory"]}, "sizeLimit": QUANTITY}),
        "persistentVolumeClaim": fields({"claimName": TEXT}),
        "configMap": fields({"name": TEXT}),
    },
)
POD_TEMPLATE = fields({"spec": fields({"containers": every(CONTAINER)}, {"volumes": every(VOLUME)})})
WORKER_GROUP = fields(
    {
        "groupName": TEXT,
        "replicas": COUNT,
        "minReplicas": COUNT,
        "maxReplicas": COUNT,
        # Values are texts, numbers are not taken.
        "rayStartParams": TEXTS,
        "template": POD_TEMPLATE,
    }
)
CLUSTER_SPEC = fields(
    {"headGroupSpec": fields({"rayStartParams": TEXTS, "template": POD_TEMPLATE})},
    {
        "rayVersion": TEXT,
        "authOptions": fields({"mode": {"enum": ["token", "disabled"]}}),
        "workerGroupSpecs": every(WORKER_GROUP),
    },
)
METADATA = fields({"name": DNS_LABEL})
RAY_CLUSTER = fields(
    {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayCluster"},
        "metadata": METADATA,
        "spec": CLUSTER_SPEC,
    }
)
RAY_JOB = fields(
    {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayJob"},
        "metadata": METADATA,
        "spec": fields(
            {"entrypoint": TEXT, "rayClusterSpec": CLUSTER_SPEC},
            {
                "backoffLimit": COUNT,
                "shutdownAfterJobFinishes": {"type": "boolean"},
                "ttlSecondsAfterFinished": COUNT,
            },
        ),
    }
)
CONFIG_MAP = fields(
    {
        "apiVersion": {"const": "v1"},
        "kind": {"const": "ConfigMap"},
        "metadata": METADATA,
        "data": TEXTS,
    }
)
BY_KIND = {"RayCluster": RAY_CLUSTER, "RayJob": RAY_JOB, "ConfigMap": CONFIG_MAP}
