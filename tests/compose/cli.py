"""The containers, run for real: `scripts/test-compose`.

The stack has a project name, ports, secrets and volumes of its own, so it disturbs nothing that runs here, and whatever
happens it is taken down again. Base images are those of PYTHON_IMAGE and REDIS_IMAGE, where set.
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

SERVICES: Final = ("redis", "mlx-server", "web", "flower")
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


class Failed(Exception):
    """The line says what did not hold."""


class Trial:
    """What is checked of a stack, step by step. Steps raise `Failed`, `EngineError` or `ClientError`."""

    def __init__(self, containers: Containers, variables: dict[str, str]) -> None:
        self._containers = containers
        self._variables = variables
        self._url = f"http://127.0.0.1:{variables['PORT']}"
        self._client = Client(self._url, variables["MLXQ_API_KEY"])

    def run(self) -> None:
        """All steps, in their order."""
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
        with step("scripts/smoke finds nothing wrong from outside"):
            self._smoke()
        with step("a job completes"):
            text = self._finish(self._client.submit(REQUEST)).text
        for service in ("mlx-server", "redis", "web"):
            with step(f"{service} is killed under a running job, comes back, and the job completes all the same"):
                self._kill(service, text)

    def _fetch_model(self) -> None:
        if not (MODEL / "config.json").exists():
            with step("the default model is fetched"):
                _run(str(ROOT / "scripts/fetch_model"))

    def _wait_healthy(self, service: str, restarts: int = 0) -> None:
        def healthy() -> bool:
            container = self._containers.inspect(service)
            if container["RestartCount"] > restarts + MANY_RESTARTS:
                raise Failed(f"{service} ends as often as it is started")
            health = container["State"]["Health"]["Status"]
            return bool(container["RestartCount"] >= restarts and health == "healthy")

        if not within(HEALTHY_WITHIN_S, healthy):
            state = self._containers.inspect(service)["State"]
            checks = state["Health"]["Log"] or [{"Output": "nothing"}]
            raise Failed(f"{service} is {state['Status']}; its health check said: {checks[-1]['Output'].strip()}")

    def _check_confined(self, service: str) -> None:
        if not self._containers.execute(service, '[ "$(id -u)" != 0 ] && ! touch /x'):
            raise Failed(f"{service} runs as root, or can write to its image")
        if service == "mlx-server" and not self._containers.execute(service, "ls models/* && ! touch models/x"):
            raise Failed("mlx-server cannot read its models, or can write to them")

    def _smoke(self) -> None:
        flower_url = f"http://127.0.0.1:{self._variables['FLOWER_PORT']}"
        _run(str(ROOT / "scripts/smoke"), "--url", self._url, "--flower-url", flower_url, variables=self._variables)

    def _kill(self, service: str, text: str) -> None:
        restarts = self._containers.inspect(service)["RestartCount"]
        job = self._client.submit(REQUEST)
        if not within(DONE_WITHIN_S, lambda: len(self._client.job(job.id).text) > len(text) // 8):
            raise Failed(f"{job.id} does not start")
        if self._client.job(job.id).status.terminal:
            raise Failed(f"{job.id} has ended before it could be disturbed")
        # Everything but PID 1, from inside: `docker kill` would be an operator's wish to have the container stopped.
        self._containers.execute(service, "kill -9 -1")
        self._wait_healthy(service, restarts + 1)
        if self._finish(job).text != text:
            raise Failed(f"{job.id} has another text than the same job undisturbed")

    def _finish(self, job: RemoteJob) -> RemoteJob:
        """The job once it has succeeded. That the API is away for a moment is no failure."""

        def ended() -> bool:
            nonlocal job
            try:
                job = self._client.job(job.id, wait_s=5)
            except ClientError:
                return False
            return job.status.terminal

        if not within(DONE_WITHIN_S, ended) or job.status is not Status.SUCCEEDED or not job.text:
            raise Failed(f"{job.id} is {job.status}: {job.error}")
        return job


@contextmanager
def step(what: str) -> Iterator[None]:
    """One line when the block is through: how long it took, and what holds now."""
    start = time.monotonic()
    outcome = "FAILED: "
    try:
        yield
        outcome = ""
    finally:
        print(f"{time.monotonic() - start:6.1f} s  {outcome}{what}", flush=True)


def within(seconds: float, probe: Callable[[], bool]) -> bool:
    """Ask again and again; whether the answer was yes in time."""
    end = time.monotonic() + seconds
    while not probe():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def variables_of_this_run() -> dict[str, str]:
    """The stack's `.env`."""
    with socket.socket() as web, socket.socket() as flower, socket.socket() as redis:
        sockets = {"PORT": web, "FLOWER_PORT": flower, "REDIS_PORT": redis}
        for each in sockets.values():
            each.bind(("127.0.0.1", 0))
        ports = {name: str(each.getsockname()[1]) for name, each in sockets.items()}
    passwords = {name: secrets.token_urlsafe() for name in ("FLOWER_PASSWORD", "REDIS_PASSWORD")}
    return {**ports, **passwords, "MLXQ_API_KEY": new_key(), "FLOWER_USER": "admin", "RATE_LIMIT": "10000/minute"}


def take_down(containers: Containers, keep_images: bool) -> None:
    """End and remove everything of this run, whatever state it is in.

    Raises:
        EngineError, Failed: something may have stayed.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with step("everything is taken down, volumes too"):
        images = () if keep_images else ("--rmi", "local")
        containers.compose("down", "--volumes", "--remove-orphans", "--timeout", str(DOWN_WITHIN_S), *images)
        for command in (("ps", "--all"), ("volume", "ls"), ("network", "ls")):
            if left := containers.remaining(*command):
                raise Failed(f"docker {' '.join(command)} still shows {', '.join(left)}")


def main(arguments: list[str] | None = None) -> int:
    """Run the trial; returns its exit status."""
    parser = argparse.ArgumentParser("scripts/test-compose", description=__doc__)
    parser.add_argument("--keep-images", action="store_true", help="leave the built images, for a quicker next run")
    options = parser.parse_args(arguments)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    project = f"mlxq-test-{secrets.token_hex(4)}"
    variables = variables_of_this_run()
    with tempfile.TemporaryDirectory(prefix=f"{project}-") as folder:  # mode 700
        env_file = Path(folder, "env")
        env_file.write_text("".join(f"{name}={value}\n" for name, value in variables.items()))
        containers = Containers(project, env_file)
        trial = Trial(containers, variables | {"ENV_FILE": str(env_file)})
        try:
            held = _holds(lambda: _run_or_show_logs(trial, containers))
        finally:
            gone = _holds(lambda: take_down(containers, options.keep_images))
    return 0 if held and gone else 1


def _run_or_show_logs(trial: Trial, containers: Containers) -> None:
    try:
        trial.run()
    except (Failed, EngineError, ClientError):
        print(containers.compose("logs", "--no-color", "--tail", "40"), file=sys.stderr)
        raise


def _holds(do: Callable[[], None]) -> bool:
    try:
        do()
    except (Failed, EngineError, ClientError) as error:
        print(f"test-compose: {error}", file=sys.stderr)
        return False
    return True


def _run(*command: str, variables: dict[str, str] | None = None) -> None:
    environment = clean_environment() | (variables or {})
    done = subprocess.run(command, env=environment, check=False, stdout=PIPE, stderr=STDOUT, text=True)
    if done.returncode:
        raise Failed(f"{command[0]} ended with status {done.returncode}\n{done.stdout}")


if __name__ == "__main__":
    sys.exit(main())
