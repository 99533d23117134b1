"""compose.yaml agrees with its schema, the settings, the Dockerfile and the documentation."""

from __future__ import annotations

import ast
import re
from fnmatch import fnmatch
from typing import Any

import jsonschema
import pytest
import yaml
from check_jsonschema.builtin_schemas import get_builtin_schema

from scripts.stack.container_health import CHECKS
from shared.environment import COMPOSE_VARIABLES
from shared.settings import ROOT, Settings
from tests.compose.cli import OBSERVABILITY, ONE_SHOT, SERVICES

TEXT = (ROOT / "compose.yaml").read_text()
FILE: dict[str, Any] = yaml.safe_load(TEXT)
DOCKERFILE = (ROOT / "Dockerfile").read_text()
SETTINGS = {name.upper() for name in Settings.model_fields}
SECRETS = {"MLXQ_API_KEY", "FLOWER_USER", "FLOWER_PASSWORD"}
FIXED = {"DATA_DIR", "ENV_FILE", "HOST", "PORT", "FLOWER_HOST", "FLOWER_PORT", "PIP_NO_CACHE_DIR"}
"""Variables with the same value in all containers, whatever the user sets."""
UNUSED = {
    "REDIS_URL",  # in ENV_FILE
    "BROKER_URL",  # the redis service is the broker too
    "FILES_DIR",  # below DATA_DIR, which is a volume
    "RESPONSES_DIR",  # the same
    "REDIS_CA_FILE",  # the redis service has no TLS
    "REDIS_CERT_FILE",
    "REDIS_KEY_FILE",
    "REDIS_MAXMEMORY_BYTES",  # for the embedded Valkey; containers use REDIS_MAXMEMORY
    "WORKERS",  # docker compose up --scale mlx-server=N
}
"""Settings without a meaning in containers."""

OWN = ("web", "background", "mlx-server", "flower")
SERVING = (*SERVICES, *OBSERVABILITY)
PROFILES = {"worker": {"model", "mlx-server"}, "observability": {"observability-init", *OBSERVABILITY}}

each_service = pytest.mark.parametrize("service", FILE["services"].values(), ids=FILE["services"])
each_serving = pytest.mark.parametrize("service", [FILE["services"][name] for name in SERVING], ids=SERVING)
each_one_shot = pytest.mark.parametrize("service", [FILE["services"][name] for name in ONE_SHOT], ids=ONE_SHOT)
each_own_service = pytest.mark.parametrize("name", OWN)


@pytest.mark.parametrize("name", ["compose.yaml", "compose.cuda.yaml"])
def test_follows_the_compose_specification(name: str) -> None:
    schema = get_builtin_schema("vendor.compose-spec")
    jsonschema.validators.validator_for(schema)(schema).validate(yaml.safe_load((ROOT / name).read_text()))


def test_the_cuda_file_changes_services_that_exist() -> None:
    changed = yaml.safe_load((ROOT / "compose.cuda.yaml").read_text())["services"]
    assert set(changed) == PROFILES["worker"]
    for service in changed.values():
        assert f"{service['build']['args']['ACCELERATOR']}) /opt/pip/bin/pip uninstall --yes mlx-cpu" in DOCKERFILE


def test_docker_compose_1_can_read_it() -> None:
    assert set(FILE) - {"services", "volumes"} == {key for key in FILE if key.startswith("x-")}
    assert "start_interval" not in TEXT
    assert "env_file" not in TEXT  # it would override the environment


def test_every_service_is_checked_by_test_compose() -> None:
    assert set(FILE["services"]) == {*SERVING, *ONE_SHOT}


def test_profiles() -> None:
    for profile, services in PROFILES.items():
        assert {name for name, each in FILE["services"].items() if profile in each.get("profiles", [])} == services


def test_every_variable_is_known_and_documented() -> None:
    used = set(re.findall(r"\$\{(\w+)", TEXT))
    assert used - SETTINGS == COMPOSE_VARIABLES
    documented = (ROOT / "docs/containers.md").read_text()
    assert not {name for name in COMPOSE_VARIABLES if f"`{name}`" not in documented}


def test_defaults_are_those_of_the_settings() -> None:
    defaults = dict(re.findall(r"\$\{(\w+):-([^}]*)\}", TEXT))
    shared = defaults.keys() & SETTINGS
    assert shared == {"HOST", "PORT", "FLOWER_HOST", "FLOWER_PORT"}
    assert {name: defaults[name] for name in shared} == {
        name: str(Settings.model_fields[name.lower()].default) for name in shared
    }


@each_own_service
def test_every_setting_reaches_own_service(name: str) -> None:
    environment = FILE["services"][name]["environment"]
    assert environment["ENV_FILE"] == "/secrets/env"
    assert set(environment) - SECRETS - FIXED == SETTINGS - SECRETS - FIXED - UNUSED
    assert [key for key in set(environment) - SECRETS - FIXED if environment[key] is not None] == []


def test_each_secret_reaches_only_the_services_that_need_it() -> None:
    holders = {
        secret: {name for name, service in FILE["services"].items() if secret in service.get("environment", {})}
        for secret in SECRETS
    }
    shown = "init"  # prints them on request
    assert holders == {
        "MLXQ_API_KEY": {shown, "web"},
        "FLOWER_USER": {shown, "flower"},
        "FLOWER_PASSWORD": {shown, "flower"},
    }
    mounts = {
        name: {volume.partition(":")[0] for volume in service.get("volumes", []) if volume.startswith("secrets-")}
        for name, service in FILE["services"].items()
    }
    assert {name: volumes for name, volumes in mounts.items() if name not in ONE_SHOT} == {
        "redis": {"secrets-redis"},
        "web": {"secrets-web"},
        "background": {"secrets-background"},
        "mlx-server": {"secrets-worker"},
        "flower": {"secrets-flower"},
        "prometheus": {"secrets-prometheus"},
        "grafana": {"secrets-grafana"},
    }
    assert mounts["model"] == {"secrets-worker"}


def test_only_the_set_up_can_write_secrets() -> None:
    writable = {
        name
        for name, service in FILE["services"].items()
        for volume in service.get("volumes", [])
        if volume.startswith("secrets-") and not volume.endswith(":ro")
    }
    assert writable == {"init", "observability-init"}


@each_one_shot
def test_set_up_is_not_repeated(service: dict[str, Any]) -> None:
    assert service["restart"] == "no"
    assert "healthcheck" not in service


@each_serving
def test_restarts_and_has_a_health_check(service: dict[str, Any]) -> None:
    assert service["restart"] == "unless-stopped"
    assert {"test", "interval", "timeout", "retries", "start_period"} == set(service["healthcheck"])
    assert service["stop_grace_period"]
    assert service["init"] is True  # otherwise a kill of all processes would not end the container


@each_service
def test_is_confined(service: dict[str, Any]) -> None:
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["pids_limit"] and "mem_limit" in service


@each_own_service
def test_starts_when_redis_is_healthy(name: str) -> None:
    assert FILE["services"][name]["depends_on"]["redis"] == {"condition": "service_healthy"}


def test_everything_starts_after_its_set_up() -> None:
    ended = {"condition": "service_completed_successfully"}
    starts = {"redis": "init", "model": "init", "mlx-server": "model", "observability-init": "init"}
    starts["prometheus"] = "observability-init"
    for name, before in starts.items():
        assert FILE["services"][name]["depends_on"][before] == ended


@each_own_service
def test_has_its_own_health_check(name: str) -> None:
    *command, argument = FILE["services"][name]["healthcheck"]["test"]
    assert command == ["CMD", "python", "-m", "scripts.stack.container_health"]
    assert argument == name
    assert name in CHECKS


def test_ports_are_published_on_loopback_by_default() -> None:
    ports = {name: service["ports"] for name, service in FILE["services"].items() if "ports" in service}
    assert ports == {
        "redis": ["127.0.0.1:${REDIS_PORT:-6379}:6379"],
        "web": ["${HOST:-127.0.0.1}:${PORT:-8080}:8080"],
        "flower": ["${FLOWER_HOST:-127.0.0.1}:${FLOWER_PORT:-5555}:5555"],
        "grafana": ["127.0.0.1:${GRAFANA_PORT:-3000}:3000"],
    }


def test_redis_is_durable_and_does_not_evict() -> None:
    redis = FILE["services"]["redis"]
    command = redis["command"]
    options = dict(zip(command[1::2], command[2::2], strict=True))
    assert options == {
        "--dir": "/data",
        "--aclfile": "/secrets/users.acl",
        "--appendonly": "yes",
        "--appendfsync": "always",
        "--save": "",
        "--maxmemory": "${REDIS_MAXMEMORY:-1gb}",
        "--maxmemory-policy": "noeviction",
    }
    assert f"queue:{options['--dir']}" in redis["volumes"]


def test_models_are_mounted_read_only() -> None:
    assert "${MODELS_DIR:-./models}:/app/models:ro" in FILE["services"]["mlx-server"]["volumes"]


def test_prefixes_are_in_a_volume() -> None:
    worker = FILE["services"]["mlx-server"]
    assert f"prefixes:{worker['environment']['DATA_DIR']}" in worker["volumes"]
    assert not any(worker["environment"]["DATA_DIR"].startswith(folder) for folder in worker["tmpfs"])


@each_own_service
def test_is_built_from_the_dockerfile(name: str) -> None:
    build = FILE["services"][name]["build"]
    assert f"AS {build['target']}\n" in DOCKERFILE
    default = re.search(r"^ARG PYTHON_IMAGE=(.*)$", DOCKERFILE, re.MULTILINE)
    assert default
    assert build["args"] == {
        "PYTHON_IMAGE": f"${{PYTHON_IMAGE:-{default[1]}}}",
        "ACCELERATOR": "${ACCELERATOR:-cpu}",
    }


def stage(name: str) -> str:
    return re.split(rf"^FROM \S+ AS {name}\n", DOCKERFILE, flags=re.MULTILINE)[1].partition("\nFROM ")[0]


@pytest.mark.parametrize("name", ["web", "worker", "model"])
def test_images_do_not_run_as_root(name: str) -> None:
    text = stage(name)
    assert text.rindex("USER mlxq") < text.index("CMD")
    assert text.rindex("USER mlxq") > text.find("USER root")


@pytest.mark.parametrize("name", ["web", "worker"])
def test_images_get_pinned_packages_from_a_stage_that_they_do_not_contain(name: str) -> None:
    assert f"COPY --from={name}-packages /opt/venv /opt/venv" in stage(name)
    assert "pip" not in stage(name)
    assert f"pip install -r requirements/{name}.txt" in stage(f"{name}-packages")
    assert {"PIP_REQUIRE_HASHES=1", "PIP_NO_DEPS=1"} <= set(stage("builder").split())


def test_the_build_context_contains_what_the_images_copy() -> None:
    copied = {
        path for line in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE) for path in line.split()
    }
    files = {path for path in copied if (ROOT / path).is_file()}
    assert files
    assert not [path for path in files if not any(fnmatch(path, pattern) for pattern in build_context())]
    assert not [pattern for pattern in build_context() if not list(ROOT.glob(pattern))]


def test_scripts_in_the_images_import_only_scripts_in_the_images() -> None:
    included = {
        str(path.relative_to(ROOT).with_suffix("")).replace("/", ".")
        for pattern in build_context()
        if pattern.startswith("scripts/")
        for path in [ROOT / pattern, *(ROOT / pattern).glob("*.py")]
    }
    assert set(re.findall(r"scripts\.stack\.\w+", TEXT)) <= included
    for name in included:
        file = ROOT / f"{name.replace('.', '/')}.py"
        tree = ast.parse(file.read_text() if file.exists() else "")
        imported = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert {module for module in imported if module.startswith("scripts")} <= included


def build_context() -> set[str]:
    return {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
