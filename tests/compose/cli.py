"""Builds and runs the containers of compose.yaml and checks them: `scripts/test-compose`.

It begins as a fresh clone does, without secrets and without a model. An earlier version is started first, and upgraded
in place while jobs wait and run. The stack has its own project name, ports and volumes, so other containers are not
affected. It is always taken down at the end. PYTHON_IMAGE, REDIS_IMAGE, PROMETHEUS_IMAGE and GRAFANA_IMAGE replace the
base images; with GRAFANA_IMAGE=none, Grafana is not started.
"""

from __future__ import annotations

import argparse
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import PIPE, STDOUT
from typing import Final

from scripts.client.api import Client, ClientError, RemoteJob
from shared.jobs.record import Status
from shared.settings import ROOT
from tests.compose.containers import Containers, EngineError, clean_environment

ONE_SHOT: Final = ("init", "model", "observability-init")
"""Services that do something and end."""
WITHOUT_WORKER: Final = ("redis", "web", "background", "flower")
SERVICES: Final = (*WITHOUT_WORKER, "mlx-server")
OBSERVABILITY: Final = ("prometheus", "grafana")
HEALTHY_WITHIN_S: Final = 300
MANY_RESTARTS: Final = 5
DONE_WITHIN_S: Final = 300
DOWN_WITHIN_S: Final = 30
UPGRADED_JOBS: Final = 12
UPGRADED_TOKENS: Final = 256
REQUEST: Final = {
    "messages": [{"role": "user", "content": "Tell me a long story about a lighthouse."}],
    "max_tokens": 128,
    "temperature": 0,
    "seed": 7,
}


class CheckFailed(Exception):
    """A check failed. The message says why."""


@dataclass(slots=True)
class Checks:
    """The checks of a stack, step by step. Steps raise `CheckFailed`, `EngineError` or `ClientError`.

    Attributes:
        variables: the stack's `.env`.
        earlier: a checkout of an earlier version, from which the stack is upgraded; None: it starts with this version.
    """

    containers: Containers
    variables: dict[str, str]
    earlier: Path | None = None
    _client: Client = field(init=False)

    def run(self) -> None:
        """Run all steps in order."""
        if self.earlier:
            self._build("the earlier version", self.earlier)
            self._start("the earlier version", self.earlier)
        self._build("the stack")
        jobs = self._submit_jobs_to_upgrade() if self.earlier else []
        self._start("the stack")
        if jobs:
            with step(f"{UPGRADED_JOBS} jobs of the earlier version complete with the same text"):
                if len(texts := {self._finish(job).text for job in jobs}) != 1:
                    raise CheckFailed(f"the texts differ: {texts}")
        for service in SERVICES:
            with step(f"{service} runs without root, on a read-only file system"):
                self._check_confined(service)
        with step("no image contains a secret"):
            self._check_no_secret()
        with step("scripts/smoke passes"):
            self._smoke()
        with step("a job completes"):
            text = self._finish(self._client.submit(REQUEST)).text
        for service in ("mlx-server", "redis", "web"):
            with step(f"{service} is killed while a job runs, restarts, and the job completes"):
                self._kill(service, text)
        with step("a worker outside of the containers runs a job"):
            self._native_worker(text)
        with step("Redis has denied nothing"):
            self._check_permissions()
        self._observe()

    def _build(self, what: str, root: Path = ROOT) -> None:
        with step(f"{what}: the images are built"):
            self.containers.compose("build", root=root)

    def _submit_jobs_to_upgrade(self) -> list[RemoteJob]:
        """Submit jobs and return as soon as one of them runs."""
        jobs = [self._client.submit({**REQUEST, "max_tokens": UPGRADED_TOKENS}) for _ in range(UPGRADED_JOBS)]
        self._wait_running(jobs[0])
        return jobs

    def _start(self, what: str, root: Path = ROOT) -> None:
        with step(f"{what}: secrets are created, the model is fetched, and the containers are started"):
            self.containers.compose("up", "--detach", root=root)
        self._client = Client(self._url, self.containers.secret("MLXQ_API_KEY"))
        for service in SERVICES:
            with step(f"{what}: {service} is healthy"):
                self._wait_healthy(service)

    @property
    def _url(self) -> str:
        return f"http://127.0.0.1:{self.variables['PORT']}"

    def _wait_healthy(self, service: str, restarts: int = 0) -> None:
        def healthy() -> bool:
            container = self.containers.inspect(service)
            if container["RestartCount"] > restarts + MANY_RESTARTS:
                raise CheckFailed(f"{service} keeps exiting")
            health = container["State"]["Health"]["Status"]
            return bool(container["RestartCount"] >= restarts and health == "healthy")

        if not within(HEALTHY_WITHIN_S, healthy):
            state = self.containers.inspect(service)["State"]
            checks = state["Health"]["Log"] or [{"Output": "nothing"}]
            raise CheckFailed(f"{service} is {state['Status']}; last health check: {checks[-1]['Output'].strip()}")

    def _check_confined(self, service: str) -> None:
        if not self.containers.execute(service, '[ "$(id -u)" != 0 ] && ! touch /x'):
            raise CheckFailed(f"{service} runs as root or can write to its image")
        if service == "mlx-server" and not self.containers.execute(service, "ls models/* && ! touch models/x"):
            raise CheckFailed("mlx-server cannot read its models, or can write to them")

    def _check_no_secret(self) -> None:
        secret = self.containers.secret("MLXQ_API_KEY")
        for service in SERVICES:
            container = self.containers.inspect(service)
            if secret in str(container["Config"]) or secret in self.containers.history(container["Image"]):
                raise CheckFailed(f"{service} shows the API key in its configuration or image")

    def _smoke(self) -> None:
        flower_url = f"http://127.0.0.1:{self.variables['FLOWER_PORT']}"
        names = ("MLXQ_API_KEY", "FLOWER_PASSWORD")
        variables = self.variables | {name: self.containers.secret(name) for name in names}
        _run(str(ROOT / "scripts/smoke"), "--url", self._url, "--flower-url", flower_url, variables=variables)

    def _check_permissions(self) -> None:
        log = self.containers.compose("logs", "--no-color")
        if denied := [line for line in log.splitlines() if re.search("NOPERM|ACL failure|No permissions", line)]:
            raise CheckFailed("\n".join(denied[:5]))

    def _native_worker(self, text: str) -> None:
        """As on a Mac: the containers but the worker, and `scripts/worker` on this machine."""
        _run(str(ROOT / "scripts/fetch_model"))
        self.containers.compose("stop", "mlx-server")
        job = self._client.submit(REQUEST)
        with tempfile.TemporaryDirectory() as data:
            variables = {"REDIS_URL": self.containers.secret("REDIS_URL"), "ENV_FILE": os.devnull, "DATA_DIR": data}
            worker = subprocess.Popen([str(ROOT / "scripts/worker")], env=clean_environment() | variables)
            try:
                if self._finish(job).text != text:
                    raise CheckFailed(f"{job.id} has a different text than in a container")
            finally:
                worker.terminate()
                worker.wait()

    def _observe(self) -> None:
        services = OBSERVABILITY[:1] if os.environ.get("GRAFANA_IMAGE") == "none" else OBSERVABILITY
        with step(f"{' and '.join(services)} start"):
            self.containers.compose("up", "--detach", "--no-recreate", *services, profiles=("observability",))
            for service in services:
                self._wait_healthy(service)
        with step("prometheus scrapes the API"):
            query = "promtool query instant http://127.0.0.1:9090 'up{job=\"mlxq\"} == 1' | grep -q mlxq"
            if not within(HEALTHY_WITHIN_S, lambda: self.containers.execute("prometheus", query)):
                raise CheckFailed("prometheus has no metrics of the API")

    def _kill(self, service: str, text: str) -> None:
        restarts = self.containers.inspect(service)["RestartCount"]
        job = self._client.submit(REQUEST)
        self._wait_running(job, len(text) // 8)
        # All processes but PID 1, from inside: after `docker kill`, the engine does not restart the container.
        self.containers.execute(service, "kill -9 -1")
        self._wait_healthy(service, restarts + 1)
        if self._finish(job).text != text:
            raise CheckFailed(f"{job.id} has a different text than without the kill")

    def _wait_running(self, job: RemoteJob, characters: int = 0) -> None:
        """Wait until a job has more than a number of characters."""
        if not within(DONE_WITHIN_S, lambda: len(self._client.job(job.id).text) > characters):
            raise CheckFailed(f"{job.id} does not start")
        if self._client.job(job.id).status.terminal:
            raise CheckFailed(f"{job.id} has ended already")

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


def make_variables(models: Path) -> dict[str, str]:
    """Create the variables of the stack's `.env`: ports, and a folder with a catalog but no model."""
    shutil.copy(ROOT / "models/catalog.toml", models)
    names = ("PORT", "FLOWER_PORT", "REDIS_PORT", "GRAFANA_PORT")
    with ExitStack() as sockets:
        listeners = {name: sockets.enter_context(socket.create_server(("127.0.0.1", 0))) for name in names}
        ports = {name: str(listener.getsockname()[1]) for name, listener in listeners.items()}
    return {**ports, "MODELS_DIR": str(models), "FLOWER_USER": "admin", "RATE_LIMIT": "10000/minute"}


@contextmanager
def earlier_version(commit: str | None) -> Iterator[Path | None]:
    """Check out a commit of this repository for the duration of the block."""
    if commit is None:
        yield None
        return
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, stdout=PIPE, check=False)
    if archive.returncode:
        sys.exit(f"test-compose: git has no commit {commit}; set --upgrade-from")
    with tempfile.TemporaryDirectory(prefix="mlxq-earlier-") as folder:
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        yield Path(folder)


def take_down(containers: Containers, keep_images: bool) -> None:
    """Remove everything of this run.

    Raises:
        EngineError, CheckFailed: something may be left.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with step("everything is removed, including volumes"):
        images = () if keep_images else ("--rmi", "local")
        profiles = ("worker", "observability")
        down = ("down", "--volumes", "--remove-orphans", "--timeout", str(DOWN_WITHIN_S))
        containers.compose(*down, *images, profiles=profiles)
        for command in (("ps", "--all"), ("volume", "ls"), ("network", "ls")):
            if left := containers.remaining(*command):
                raise CheckFailed(f"docker {' '.join(command)} still lists {', '.join(left)}")


def main(arguments: list[str] | None = None) -> int:
    """Run the checks; return the exit status."""
    parser = argparse.ArgumentParser("scripts/test-compose", description=__doc__)
    parser.add_argument("--keep-images", action="store_true", help="keep the built images for the next run")
    parser.add_argument(
        "--upgrade-from", metavar="COMMIT", default="HEAD~1", help="earlier version; empty: none (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    project = f"mlxq-test-{secrets.token_hex(4)}"
    with (
        tempfile.TemporaryDirectory(prefix=f"{project}-") as folder,
        earlier_version(options.upgrade_from or None) as earlier,
    ):
        models = Path(folder, "models")
        models.mkdir()
        Path(folder).chmod(0o755)  # the containers' user reads the models
        variables = make_variables(models)
        env_file = Path(folder, "env")
        env_file.write_text("".join(f"{name}={value}\n" for name, value in variables.items()))
        containers = Containers(project, env_file)
        checks = Checks(containers, variables | {"ENV_FILE": str(env_file)}, earlier)
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
