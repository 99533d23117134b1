"""The manifests in deploy/kubernetes follow Kubernetes' schemas, and agree with the images and the settings."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from typing import Any, Final

import kubernetes_validate
import pytest
import yaml
from dotenv import dotenv_values

from shared.models.catalog import load_catalog
from shared.settings import ROOT, Settings

FOLDER: Final = ROOT / "deploy/kubernetes"
BASE: Final = FOLDER / "base"
KUSTOMIZATION: Final[dict[str, Any]] = yaml.safe_load((BASE / "kustomization.yaml").read_text())
OBJECTS: Final[list[dict[str, Any]]] = [
    each for file in KUSTOMIZATION["resources"] for each in yaml.safe_load_all((BASE / file).read_text())
]
VERSIONS: Final = ("1.30", "1.37")
"""The oldest and the newest version of Kubernetes whose schema is checked."""
SETTINGS: Final = {name.upper() for name in Settings.model_fields}
SECRETS: Final = {"mlxq-valkey", "mlxq-web", "mlxq-background", "mlxq-worker", "mlxq-flower"}
LONG_RUNNING: Final = ("Deployment", "StatefulSet")


def of_kind(*kinds: str) -> list[dict[str, Any]]:
    return [each for each in OBJECTS if each["kind"] in kinds]


def names(*kinds: str) -> set[str]:
    return {each["metadata"]["name"] for each in of_kind(*kinds)}


WORKLOADS: Final = of_kind(*LONG_RUNNING, "Job")
each_workload = pytest.mark.parametrize("workload", WORKLOADS, ids=lambda each: each["metadata"]["name"])


def pod(workload: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = workload["spec"]["template"]["spec"]
    return spec


def container(workload: dict[str, Any]) -> dict[str, Any]:
    (only,) = pod(workload)["containers"]
    return dict(only)


def label(workload: dict[str, Any]) -> str:
    return str(workload["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/name"])


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("manifest", OBJECTS, ids=lambda each: f"{each['kind']}-{each['metadata']['name']}")
def test_follows_the_schema_of_kubernetes(manifest: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(manifest, version, strict=True)


def test_an_invalid_manifest_would_be_found() -> None:
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**OBJECTS[0], "specification": {}}, VERSIONS[0], strict=True)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize(("overlay", "gpus"), [("base", 0), ("cuda", 1)])
def test_kustomize_builds_it(overlay: str, gpus: int) -> None:
    done = subprocess.run(["kubectl", "kustomize", FOLDER / overlay], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    built = list(yaml.safe_load_all(done.stdout))
    assert len(built) == len(OBJECTS) + len(KUSTOMIZATION["configMapGenerator"])
    assert {each["metadata"].get("namespace", "mlxq") for each in built} == {"mlxq"}
    for manifest in built:
        kubernetes_validate.validate(manifest, VERSIONS[-1], strict=True)
    (worker,) = [each for each in built if (each["kind"], each["metadata"]["name"]) == ("Deployment", "worker")]
    assert container(worker)["resources"]["limits"].get("nvidia.com/gpu", 0) == gpus


def test_every_file_is_part_of_the_base() -> None:
    assert {path.name for path in BASE.glob("*.yaml")} == {*KUSTOMIZATION["resources"], "kustomization.yaml"}
    assert all(count == 1 for count in Counter((each["kind"], each["metadata"]["name"]) for each in OBJECTS).values())
    assert not of_kind("Secret")


@each_workload
def test_pods_are_confined(workload: dict[str, Any]) -> None:
    spec, only = pod(workload), container(workload)
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] >= 999
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert only["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert spec["automountServiceAccountToken"] is False
    # Otherwise the Service `flower` would set FLOWER_PORT to a URL.
    assert spec["enableServiceLinks"] is False
    assert only["resources"]["limits"]["memory"] and only["resources"]["requests"].keys() == {"cpu", "memory"}


@each_workload
def test_volumes_and_images_exist(workload: dict[str, Any]) -> None:
    volumes = {each["name"]: each for each in pod(workload)["volumes"]}
    claims = {each["metadata"]["name"] for each in workload["spec"].get("volumeClaimTemplates", [])}
    assert {each["name"] for each in container(workload)["volumeMounts"]} == volumes.keys() | claims
    for volume in volumes.values():
        if "persistentVolumeClaim" in volume:
            assert volume["persistentVolumeClaim"]["claimName"] in names("PersistentVolumeClaim")
        if "configMap" in volume:
            assert volume["configMap"]["name"] in {each["name"] for each in KUSTOMIZATION["configMapGenerator"]}
    assert container(workload)["image"] in {each["name"] for each in KUSTOMIZATION["images"]}


@each_workload
def test_variables_are_settings_and_secrets_are_references(workload: dict[str, Any]) -> None:
    only = container(workload)
    variables = {each["name"] for each in only.get("env", [])}
    assert variables <= SETTINGS | {"PIP_NO_CACHE_DIR"}
    references = {each["secretRef"]["name"] for each in only.get("envFrom", []) if "secretRef" in each}
    references |= {each["secret"]["secretName"] for each in pod(workload)["volumes"] if "secret" in each}
    assert references == {f"mlxq-{label(workload)}"} & SECRETS


def test_every_secret_is_documented() -> None:
    used = {f"mlxq-{label(workload)}" for workload in WORKLOADS} & SECRETS
    documented = (ROOT / "docs/containers.md").read_text()
    assert used == SECRETS and not [name for name in SECRETS if name not in documented]


@each_workload
def test_commands_are_modules_of_the_image(workload: dict[str, Any]) -> None:
    probes = [container(workload).get(name, {}) for name in ("startupProbe", "readinessProbe", "livenessProbe")]
    commands = [container(workload).get("command", []), *(probe.get("exec", {}).get("command", []) for probe in probes)]
    modules = [command[2] for command in commands if command[:2] == ["python", "-m"]]
    for module in modules:
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or path.is_dir(), module


@pytest.mark.parametrize("workload", of_kind(*LONG_RUNNING), ids=lambda each: each["metadata"]["name"])
def test_pods_have_probes_and_replicas_have_a_disruption_budget(workload: dict[str, Any]) -> None:
    assert container(workload)["readinessProbe"]
    if workload["spec"]["replicas"] > 1 or label(workload) == "worker":
        assert label(workload) in names("PodDisruptionBudget")


def test_selectors_match_pods() -> None:
    labels = {label(workload) for workload in WORKLOADS}
    text = "".join((BASE / file).read_text() for file in KUSTOMIZATION["resources"])
    assert set(re.findall(r"app\.kubernetes\.io/name: (\w+)", text)) == labels
    listed = {name for names in re.findall(r"values: \[(.+)\]", text) for name in names.split(", ")}
    assert listed <= labels


def test_nothing_is_reachable_unless_it_is_allowed() -> None:
    policies = {each["metadata"]["name"]: each["spec"] for each in of_kind("NetworkPolicy")}
    assert policies["deny-by-default"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    open_to = {name for name, spec in policies.items() if any("from" not in rule for rule in spec.get("ingress", []))}
    assert open_to == {"web"}


def test_settings_and_catalog_are_valid() -> None:
    variables = dotenv_values(BASE / "settings.env")
    assert variables.keys() <= SETTINGS
    settings = Settings(_env_file=None, models_file=BASE / "catalog.toml")
    assert not load_catalog(settings).faults


def test_valkey_is_durable_and_does_not_evict() -> None:
    (valkey,) = of_kind("StatefulSet")
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["redis"]["command"]
    assert container(valkey)["args"] == [*(each.replace("${REDIS_MAXMEMORY:-1gb}", "1gb") for each in compose[1:])]
