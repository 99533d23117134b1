"""The stack of compose.yaml, as the container engine sees it."""

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
    """A command of the engine or of Compose did not succeed; the message is what it said."""


class Containers:
    """One project of compose.yaml with an environment file of its own.

    Every method raises `EngineError`.
    """

    def __init__(self, project: str, env_file: Path) -> None:
        self._project = project
        command = shlex.split(os.environ.get("COMPOSE", "docker compose"))
        where = ("-f", str(ROOT / "compose.yaml"), "--env-file", str(env_file), "-p", project)
        self._compose = (*command, "--ansi", "never", *where)
        self._env = clean_environment()

    def compose(self, *arguments: str) -> str:
        """What a command of Compose prints."""
        return _output(*self._compose, *arguments, env=self._env)

    def inspect(self, service: str) -> Json:
        """What the engine knows of a service's only container."""
        of_service = f"label=com.docker.compose.service={service}"
        containers = self.remaining("ps", "--all", "--filter", of_service)
        if len(containers) != 1:
            raise EngineError(f"{service} has {len(containers)} containers")
        found: list[Json] = json.loads(_output("docker", "inspect", containers[0]))
        return found[0]

    def execute(self, service: str, script: str) -> bool:
        """Whether a line of shell, run in a service's container as its user, succeeds."""
        command = ("docker", "exec", self.inspect(service)["Id"], "sh", "-c", script)
        return subprocess.run(command, check=False, capture_output=True).returncode == 0

    def remaining(self, *command: str) -> list[str]:
        """Ids of what the engine has of this project: `ps --all`, `volume ls`, `network ls`."""
        of_project = f"label=com.docker.compose.project={self._project}"
        return _output("docker", *command, "--quiet", "--filter", of_project).split()


def clean_environment() -> dict[str, str]:
    """This process's environment without what would reach the stack; names of base images stay."""
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
            # The whole group: a build that Compose has started would go on without it.
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            raise
    if process.returncode:
        raise EngineError(f"{' '.join(command)}: exit status {process.returncode}\n{output}")
    return output
