"""examples/trainjob.yaml: the fields of Kubernetes and Kubeflow's trainer exist, and its parts fit together."""

import re
from typing import Any

import pytest

from tests.helpers.fake_clusters import EXAMPLES, load_yaml_documents


def one_of(**properties: Any) -> dict[str, Any]:
    """The schema of an object with these fields only."""
    return {"type": "object", "additionalProperties": False, "properties": properties}


TEXT, COUNT, LABELS = {"type": "string"}, {"type": "integer", "minimum": 1}, {"type": "object"}
METADATA = one_of(name=TEXT, labels=LABELS)
VOLUMES = {
    "type": "array",
    "items": one_of(
        name=TEXT, persistentVolumeClaim=one_of(claimName=TEXT), emptyDir=one_of(medium={"const": "Memory"})
    ),
}
CONTAINER = one_of(
    name={"const": "node"}, volumeMounts={"type": "array", "items": one_of(name=TEXT, mountPath={"pattern": "^/"})}
)
POD = one_of(
    restartPolicy={"enum": ["Never", "OnFailure"]},
    terminationGracePeriodSeconds=COUNT,
    securityContext=one_of(fsGroup=COUNT),
    containers={"type": "array", "items": CONTAINER, "minItems": 1, "maxItems": 1},
    volumes=VOLUMES,
)
JOBS = one_of(
    name={"const": "node"},
    template=one_of(metadata=METADATA, spec=one_of(backoffLimit={"const": 0}, template=one_of(spec=POD))),
)
JOB_SET = one_of(failurePolicy=one_of(maxRestarts=COUNT), replicatedJobs={"type": "array", "items": JOBS})
QUANTITIES = {"type": "object", "additionalProperties": {"type": "string", "pattern": r"^\d+[A-Za-z]*$"}}
TRAINER = one_of(
    image=TEXT,
    numNodes=COUNT,
    numProcPerNode=COUNT,
    resourcesPerNode=one_of(requests=QUANTITIES, limits=QUANTITIES),
    env={"type": "array", "items": one_of(name=TEXT, value=TEXT)},
    command={"type": "array", "items": TEXT},
)
API = "trainer.kubeflow.org/v1alpha1"
REFERENCE = one_of(
    apiGroup={"const": API.partition("/")[0]}, kind={"enum": ["TrainingRuntime", "ClusterTrainingRuntime"]}, name=TEXT
)
# By hand, after https://kubernetes.io/docs/reference/kubernetes-api/ (the claim) and the definitions in
# https://github.com/kubeflow/trainer/tree/master/manifests/base/crds, what of them we use.
KINDS = {
    "PersistentVolumeClaim": ("v1", one_of(
        accessModes={"const": ["ReadWriteMany"]}, storageClassName=TEXT, resources=one_of(requests=QUANTITIES)
    )),
    "TrainingRuntime": (API, one_of(
        mlPolicy=one_of(numNodes=COUNT, torch={"type": "object", "maxProperties": 0}), template=one_of(spec=JOB_SET)
    )),
    "TrainJob": (API, one_of(runtimeRef=REFERENCE, trainer=TRAINER)),
}  # fmt: skip


def test_the_trainjob_fields_exist() -> None:
    jsonschema = pytest.importorskip("jsonschema_rs", reason="jsonschema-rs is not installed")
    found = load_yaml_documents("trainjob.yaml")
    assert [document["kind"] for document in found] == list(KINDS)
    for document in found:
        version, spec = KINDS[document["kind"]]
        whole = one_of(apiVersion={"const": version}, kind=TEXT, metadata=METADATA, spec=spec)
        errors = jsonschema.validator_for(whole).iter_errors(document)
        assert [(list(error.instance_path), error.message) for error in errors] == []


def test_the_parts_of_the_train_job_fit_together() -> None:
    claim, runtime, job = load_yaml_documents("trainjob.yaml")
    trainer, reference = job["spec"]["trainer"], job["spec"]["runtimeRef"]
    assert (reference["kind"], reference["name"]) == (runtime["kind"], runtime["metadata"]["name"])
    assert runtime["spec"]["mlPolicy"]["numNodes"] == trainer["numNodes"]
    (hosts,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    labels = hosts["template"]["metadata"]["labels"]
    assert labels["trainer.kubeflow.org/trainjob-ancestor-step"] == "trainer"
    pod = hosts["template"]["spec"]["template"]["spec"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounts["/shared"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    variables = {variable["name"]: variable["value"] for variable in trainer["env"]}
    assert any(variables["GPT2_HOME"].startswith(f"{path}/") for path in mounts)
    assert int(variables["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    uid = re.search(r"^USER \d+:(\d+)$", (EXAMPLES.parent / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    assert uid
    assert pod["securityContext"]["fsGroup"] == int(uid[1])
