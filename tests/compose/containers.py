"""Access to the containers of compose.yaml through the container engine."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from subprocess import PIPE, STDOUT
from typing import Any

from shared.environment import BASE_IMAGES, COMPOSE_VARIABLES
from shared.settings import ROOT, Settings

Json = dict[str, Any]


class EngineError(Exception):
    """A command of the engine or of Compose failed. The message contains its output."""


class Containers:
    """A Compose project with its own environment file.

    Every method raises `EngineError`.
    """

    def __init__(self, project: str, env_file: Path) -> None:
        self._project = project
        self._env_file = env_file
        self._env = clean_environment()

    def compose(self, *arguments: str, root: Path = ROOT, profiles: Sequence[str] = ("worker",)) -> str:
        """Run a Compose command with the compose.yaml of a checkout; return its output."""
        command = shlex.split(os.environ.get("COMPOSE", "docker compose"))
        where = ("-f", str(root / "compose.yaml"), "--env-file", str(self._env_file), "-p", self._project)
        selected = [word for profile in profiles for word in ("--profile", profile)]
        return _output(*command, "--ansi", "never", *where, *selected, *arguments, env=self._env)

    def secret(self, name: str) -> str:
        """Return a secret that the service `init` has created."""
        return self.compose("run", "--rm", "--no-deps", "-T", "init", "show", name).split()[-1]

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

    def history(self, image: str) -> str:
        """Return the commands that built an image."""
        return _output("docker", "history", "--no-trunc", "--format", "{{.CreatedBy}}", image)

    def remaining(self, *command: str) -> list[str]:
        """Return the ids of this project's containers, volumes or networks: `ps --all`, `volume ls`, `network ls`."""
        project_label = f"label=com.docker.compose.project={self._project}"
        return _output("docker", *command, "--quiet", "--filter", project_label).split()


def clean_environment() -> dict[str, str]:
    """Return this process's environment without variables that would affect the stack, except for base images."""
    settings = {name.upper() for name in Settings.model_fields}
    ours = settings | COMPOSE_VARIABLES - BASE_IMAGES | {"ENV_FILE"}
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
