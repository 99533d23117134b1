"""Builds and runs the containers of compose.yaml and checks them: `scripts/test-compose`.

The stack has its own project name, ports, secrets and volumes, so other containers are not affected. It is always taken
down at the end. PYTHON_IMAGE and REDIS_IMAGE replace the base images.
"""

from __future__ import annotations

import argparse
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE, STDOUT
from typing import Final

from scripts.client.api import Client, ClientError, RemoteJob
from shared.jobs.record import Status
from shared.settings import ROOT
from tests.compose.containers import Containers, EngineError, clean_environment
from web.access.api_keys import new_key

SERVICES: Final = ("redis", "mlx-server", "web", "background", "flower")
HEALTHY_WITHIN_S: Final = 300
MANY_RESTARTS: Final = 5
DONE_WITHIN_S: Final = 300
DOWN_WITHIN_S: Final = 30
MODEL: Final = ROOT / "models/SmolLM2-135M-Instruct"
REQUEST: Final = {
    "messages": [{"role": "user", "content": "Tell me a long story about a lighthouse."}],
    "max_tokens": 128,
    "temperature": 0,
    "seed": 7,
}


class CheckFailed(Exception):
    """A check failed. The message says why."""


class Checks:
    """The checks of a stack, step by step. Steps raise `CheckFailed`, `EngineError` or `ClientError`."""

    def __init__(self, containers: Containers, variables: dict[str, str]) -> None:
        self._containers = containers
        self._variables = variables
        self._url = f"http://127.0.0.1:{variables['PORT']}"
        self._client = Client(self._url, variables["MLXQ_API_KEY"])

    def run(self) -> None:
        """Run all steps in order."""
        self._fetch_model()
        with step("the images are built"):
            self._containers.compose("build")
        with step("the containers are created and started"):
            self._containers.compose("up", "--detach")
        for service in SERVICES:
            with step(f"{service} is healthy"):
                self._wait_healthy(service)
        for service in SERVICES:
            with step(f"{service} runs without root, on a read-only file system"):
                self._check_confined(service)
        with step("scripts/smoke passes"):
            self._smoke()
        with step("a job completes"):
            text = self._finish(self._client.submit(REQUEST)).text
        for service in ("mlx-server", "redis", "web"):
            with step(f"{service} is killed while a job runs, restarts, and the job completes"):
                self._kill(service, text)

    def _fetch_model(self) -> None:
        if not (MODEL / "config.json").exists():
            with step("the default model is fetched"):
                _run(str(ROOT / "scripts/fetch_model"))

    def _wait_healthy(self, service: str, restarts: int = 0) -> None:
        def healthy() -> bool:
            container = self._containers.inspect(service)
            if container["RestartCount"] > restarts + MANY_RESTARTS:
                raise CheckFailed(f"{service} keeps exiting")
            health = container["State"]["Health"]["Status"]
            return bool(container["RestartCount"] >= restarts and health == "healthy")

        if not within(HEALTHY_WITHIN_S, healthy):
            state = self._containers.inspect(service)["State"]
            checks = state["Health"]["Log"] or [{"Output": "nothing"}]
            raise CheckFailed(f"{service} is {state['Status']}; last health check: {checks[-1]['Output'].strip()}")

    def _check_confined(self, service: str) -> None:
        if not self._containers.execute(service, '[ "$(id -u)" != 0 ] && ! touch /x'):
            raise CheckFailed(f"{service} runs as root or can write to its image")
        if service == "mlx-server" and not self._containers.execute(service, "ls models/* && ! touch models/x"):
            raise CheckFailed("mlx-server cannot read its models, or can write to them")

    def _smoke(self) -> None:
        flower_url = f"http://127.0.0.1:{self._variables['FLOWER_PORT']}"
        _run(str(ROOT / "scripts/smoke"), "--url", self._url, "--flower-url", flower_url, variables=self._variables)

    def _kill(self, service: str, text: str) -> None:
        restarts = self._containers.inspect(service)["RestartCount"]
        job = self._client.submit(REQUEST)
        if not within(DONE_WITHIN_S, lambda: len(self._client.job(job.id).text) > len(text) // 8):
            raise CheckFailed(f"{job.id} does not start")
        if self._client.job(job.id).status.terminal:
            raise CheckFailed(f"{job.id} ended before the kill")
        # All processes but PID 1, from inside: after `docker kill`, the engine does not restart the container.
        self._containers.execute(service, "kill -9 -1")
        self._wait_healthy(service, restarts + 1)
        if self._finish(job).text != text:
            raise CheckFailed(f"{job.id} has a different text than without the kill")

    def _finish(self, job: RemoteJob) -> RemoteJob:
        """Wait until a job has succeeded, also while the API restarts."""

        def ended() -> bool:
            nonlocal job
            try:
                job = self._client.job(job.id, wait_s=5)
            except ClientError:
                return False
            return job.status.terminal

        if not within(DONE_WITHIN_S, ended) or job.status is not Status.SUCCEEDED or not job.text:
            raise CheckFailed(f"{job.id} is {job.status}: {job.error}")
        return job


@contextmanager
def step(description: str) -> Iterator[None]:
    """Print the duration and the outcome of the block."""
    start = time.monotonic()
    outcome = "FAILED: "
    try:
        yield
        outcome = ""
    finally:
        print(f"{time.monotonic() - start:6.1f} s  {outcome}{description}", flush=True)


def within(seconds: float, probe: Callable[[], bool]) -> bool:
    """Poll until the probe is true; return whether that happened in time."""
    end = time.monotonic() + seconds
    while not probe():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def make_variables() -> dict[str, str]:
    """Create the variables of the stack's `.env`."""
    with socket.socket() as web, socket.socket() as flower, socket.socket() as redis:
        sockets = {"PORT": web, "FLOWER_PORT": flower, "REDIS_PORT": redis}
        for listener in sockets.values():
            listener.bind(("127.0.0.1", 0))
        ports = {name: str(listener.getsockname()[1]) for name, listener in sockets.items()}
    passwords = {name: secrets.token_urlsafe() for name in ("FLOWER_PASSWORD", "REDIS_PASSWORD")}
    return {**ports, **passwords, "MLXQ_API_KEY": new_key(), "FLOWER_USER": "admin", "RATE_LIMIT": "10000/minute"}


def take_down(containers: Containers, keep_images: bool) -> None:
    """Remove everything of this run.

    Raises:
        EngineError, CheckFailed: something may be left.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with step("everything is removed, including volumes"):
        images = () if keep_images else ("--rmi", "local")
        containers.compose("down", "--volumes", "--remove-orphans", "--timeout", str(DOWN_WITHIN_S), *images)
        for command in (("ps", "--all"), ("volume", "ls"), ("network", "ls")):
            if left := containers.remaining(*command):
                raise CheckFailed(f"docker {' '.join(command)} still lists {', '.join(left)}")


def main(arguments: list[str] | None = None) -> int:
    """Run the checks; return the exit status."""
    parser = argparse.ArgumentParser("scripts/test-compose", description=__doc__)
    parser.add_argument("--keep-images", action="store_true", help="keep the built images for the next run")
    options = parser.parse_args(arguments)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    project = f"mlxq-test-{secrets.token_hex(4)}"
    variables = make_variables()
    with tempfile.TemporaryDirectory(prefix=f"{project}-") as folder:  # mode 700
        env_file = Path(folder, "env")
        env_file.write_text("".join(f"{name}={value}\n" for name, value in variables.items()))
        containers = Containers(project, env_file)
        checks = Checks(containers, variables | {"ENV_FILE": str(env_file)})
        try:
            passed = _succeeds(lambda: _run_or_show_logs(checks, containers))
        finally:
            removed = _succeeds(lambda: take_down(containers, options.keep_images))
    return 0 if passed and removed else 1


def _run_or_show_logs(checks: Checks, containers: Containers) -> None:
    try:
        checks.run()
    except (CheckFailed, EngineError, ClientError):
        print(containers.compose("logs", "--no-color", "--tail", "40"), file=sys.stderr)
        raise


def _succeeds(action: Callable[[], None]) -> bool:
    try:
        action()
    except (CheckFailed, EngineError, ClientError) as error:
        print(f"test-compose: {error}", file=sys.stderr)
        return False
    return True


def _run(*command: str, variables: dict[str, str] | None = None) -> None:
    environment = clean_environment() | (variables or {})
    done = subprocess.run(command, env=environment, check=False, stdout=PIPE, stderr=STDOUT, text=True)
    if done.returncode:
        raise CheckFailed(f"{command[0]} ended with status {done.returncode}\n{done.stdout}")


if __name__ == "__main__":
    sys.exit(main())
