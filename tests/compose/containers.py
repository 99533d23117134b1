"""Access to the containers of compose.yaml through the container engine."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
from pathlib import Path
from subprocess import PIPE, STDOUT
from typing import Any, Final

from shared.settings import ROOT, Settings

Json = dict[str, Any]

COMPOSE_VARIABLES: Final = frozenset(
    {"MODELS_DIR", "REDIS_PASSWORD", "REDIS_PORT", "REDIS_MAXMEMORY", "PYTHON_IMAGE", "REDIS_IMAGE"}
)
"""Variables of compose.yaml that are not settings."""


class EngineError(Exception):
    """A command of the engine or of Compose failed. The message contains its output."""


class Containers:
    """A Compose project with its own environment file.

    Every method raises `EngineError`.
    """

    def __init__(self, project: str, env_file: Path) -> None:
        self._project = project
        command = shlex.split(os.environ.get("COMPOSE", "docker compose"))
        where = ("-f", str(ROOT / "compose.yaml"), "--env-file", str(env_file), "-p", project)
        self._compose = (*command, "--ansi", "never", *where)
        self._env = clean_environment()

    def compose(self, *arguments: str) -> str:
        """Run a Compose command; return its output."""
        return _output(*self._compose, *arguments, env=self._env)

    def inspect(self, service: str) -> Json:
        """Return the engine's description of a service's only container."""
        service_label = f"label=com.docker.compose.service={service}"
        containers = self.remaining("ps", "--all", "--filter", service_label)
        if len(containers) != 1:
            raise EngineError(f"{service} has {len(containers)} containers")
        descriptions: list[Json] = json.loads(_output("docker", "inspect", containers[0]))
        return descriptions[0]

    def execute(self, service: str, script: str) -> bool:
        """Run a shell script in a service's container as its user; return whether it succeeded."""
        command = ("docker", "exec", self.inspect(service)["Id"], "sh", "-c", script)
        return subprocess.run(command, check=False, capture_output=True).returncode == 0

    def remaining(self, *command: str) -> list[str]:
        """Return the ids of this project's containers, volumes or networks: `ps --all`, `volume ls`, `network ls`."""
        project_label = f"label=com.docker.compose.project={self._project}"
        return _output("docker", *command, "--quiet", "--filter", project_label).split()


def clean_environment() -> dict[str, str]:
    """Return this process's environment without variables that would affect the stack, except for base images."""
    settings = {name.upper() for name in Settings.model_fields}
    ours = settings | COMPOSE_VARIABLES - {"PYTHON_IMAGE", "REDIS_IMAGE"} | {"ENV_FILE"}
    return {name: value for name, value in os.environ.items() if name not in ours and not name.startswith("COMPOSE_")}


def _output(*command: str, env: dict[str, str] | None = None) -> str:
    with subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=PIPE, stderr=STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            output, _ = process.communicate()
        except BaseException:
            # The whole group, because a build would continue without Compose.
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            raise
    if process.returncode:
        raise EngineError(f"{' '.join(command)}: exit status {process.returncode}\n{output}")
    return output
