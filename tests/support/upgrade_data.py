"""Creates the stored data for the upgrade test.

python -m tests.support.upgrade_data CHECKOUT FOLDER

Runs the stack of an earlier checkout with the fake backend, leaves jobs in every state, and kills all processes at
once, as a power failure does. Stores the queue's append-only file (as text), the hashes of two throwaway API keys, and
the texts that uninterrupted runs of the same requests generate.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import redis

from scripts.stack.ports import free_port
from tests.bench import job_load
from tests.bench.checkouts import Checkout
from tests.bench.endpoints import Own
from tests.bench.processes import process, wait_for
from tests.bench.scenarios.images import png
from tests.support.waiting import eventually

KEYS: Final = {name: f"mlxq_{digit * 8}_{digit * 43}" for name, digit in (("ann", "1"), ("bob", "2"))}
"""Throwaway API keys of two owners."""
MODELS: Final = ("alpha", "beta")
"""One model per worker."""
FOREVER_S: Final = 3_000_000_000
"""Retention and deadlines, so that the data does not expire."""
TOKENS_BEFORE_KILL: Final = 12
"""Minimum tokens of a job when its worker is killed."""

_SLOW: Final = "!every=0.05"


def catalog(home: Path) -> str:
    """Create the model folders in `home` and return the text of a catalog."""
    for name in MODELS:
        (home / name).mkdir()
        (home / name / "config.json").write_text("{}")
        (home / name / "model.safetensors").write_bytes(b"")
    return "\n".join(f'[models.{name}]\npath = "{home / name}"' for name in MODELS)


def variables(home: Path, port: int) -> dict[str, str]:
    """Return the environment of a stack in `home`, which contains `catalog.toml`."""
    return {
        "ENV_FILE": os.devnull,
        "DATA_DIR": str(home / "data"),
        "MODELS_FILE": str(home / "catalog.toml"),
        "MODEL_PATH": "",
        "WORKERS": str(len(MODELS)),
        "WORKER_MODELS": ";".join(MODELS),
        "BACKEND": "fake",
        "LOAD_ON_DEMAND": "false",
        "PORT": str(port),
        "RATE_LIMIT": "1000000/minute",
        "MLXQ_API_KEY": KEYS["ann"],
        "RETENTION_S": str(FOREVER_S),
        **dict.fromkeys(("START_WITHIN_S", "MAX_START_WITHIN_S"), str(FOREVER_S)),
        **dict.fromkeys(("DEADLINE_S", "MAX_DEADLINE_S"), str(FOREVER_S)),
    }


@dataclass(frozen=True, slots=True)
class StoredRequest:
    """A request whose job is in the stored data.

    Attributes:
        end: status of the job in the stored data.
    """

    owner: str
    body: dict[str, Any]
    end: str = "queued"
    idempotency_key: str = ""


def _body(model: str, tokens: int, prompt: str, **more: Any) -> dict[str, Any]:
    return {"model": model, "prompt": prompt, "max_tokens": tokens, "seed": 7, **more}


def _talk(model: str, *texts: Any, **more: Any) -> dict[str, Any]:
    roles = ("system", "user", "assistant", "user")
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return {"model": model, "messages": messages, "max_tokens": 9, "seed": 8, **more}


def _image(number: int) -> list[dict[str, Any]]:
    url = "data:image/png;base64," + base64.b64encode(png(20, 12, number)).decode()
    return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]


ENDED: Final = {
    "succeeded": StoredRequest("ann", _body("alpha", 10, "Over."), "succeeded"),
    "succeeded-twice-sent": StoredRequest("bob", _body("beta", 5, "Once."), "succeeded", idempotency_key="once"),
    "failed": StoredRequest("ann", _body("beta", 10, "Fail. !row-fails=4"), "failed"),
    "cancelled-running": StoredRequest("bob", _body("alpha", 400, f"Stop me. {_SLOW}"), "cancelled"),
}
CUT: Final = {
    "interrupted": StoredRequest("ann", _body("alpha", 40, f"Interrupt me. {_SLOW}")),
    "running": StoredRequest("bob", _body("beta", 120, f"I run when the power fails. {_SLOW}"), "running"),
}
"""Jobs that workers had started."""
WAITING: Final = {
    "plain": StoredRequest("ann", _body("alpha", 8, "Wait.")),
    "other-owner": StoredRequest("bob", _body("alpha", 8, "Wait as well.")),
    "high": StoredRequest("bob", _body("alpha", 8, "In front.", priority="high")),
    "batch": StoredRequest("ann", _body("alpha", 8, "Whenever.", priority="batch", metadata={"line": "17"})),
    "stop": StoredRequest("ann", _body("alpha", 60, "Up to a word.", stop=["the", "river"])),
    "sampled": StoredRequest("ann", _body("alpha", 12, "Perhaps.", temperature=0.8, top_p=0.9)),
    "talk": StoredRequest("ann", _talk("alpha", "Be brief.", "Hello?", "Yes.", "Who is there?")),
    "other-model": StoredRequest("ann", _body("beta", 8, "Somewhere else.")),
    "other-talk": StoredRequest("bob", _talk("beta", "Be kind.", "Good morning.", priority="batch")),
    "images": StoredRequest("ann", _talk("beta", "Look.", _image(1))),
    "twice-sent": StoredRequest("bob", _body("beta", 8, "Only once."), idempotency_key="again"),
    "cancelled-waiting": StoredRequest("ann", _body("alpha", 8, "Never mind."), "cancelled"),
}
ALL: Final = ENDED | CUT | WAITING


@dataclass
class Running:
    """A running stack of the earlier checkout."""

    checkout: Checkout
    home: Path
    port: int
    ids: dict[str, str] = field(default_factory=dict)

    def endpoint(self, owner: str, idempotency_key: str = "") -> Own:
        """Return the API as one owner accesses it."""
        headers = {"X-API-Key": KEYS[owner]}
        return Own(
            f"http://127.0.0.1:{self.port}", headers | ({"Idempotency-Key": idempotency_key} if idempotency_key else {})
        )

    def submit(self, *names: str) -> None:
        """Submit requests of `ALL`, one after another."""
        for name in names:
            request = ALL[name]
            endpoint = self.endpoint(request.owner, request.idempotency_key)
            (self.ids[name],) = job_load.submit(endpoint, [request.body])

    def job(self, name: str) -> dict[str, Any]:
        """Return a job as the API shows it."""
        (job,) = job_load.records(self.endpoint(ALL[name].owner), [self.ids[name]])
        return job

    def wait_for_text(self, name: str) -> None:
        """Wait until a job has generated some text."""
        spaces = TOKENS_BEFORE_KILL - 1
        eventually(lambda: ((self.job(name)["output"] or {}).get("text") or "").count(" ") > spaces, name, 30)

    def end(self, *names: str) -> None:
        """Wait until jobs have ended with the expected status."""
        for name in names:
            (job,) = job_load.ended(self.endpoint(ALL[name].owner), [self.ids[name]], 60)
            assert job["status"] == ALL[name].end, job

    def cancel(self, name: str) -> None:
        """Cancel a job."""
        job_load.cancel(self.endpoint(ALL[name].owner), self.ids[name])


@contextmanager
def started(checkout: Checkout, home: Path, slots: int) -> Iterator[tuple[Running, dict[str, Any]]]:
    """Start a stack with one worker per model. Yields it and its processes by name."""
    port = free_port()
    (home / "catalog.toml").write_text(catalog(home))
    env = variables(home, port) | {"SLOTS": str(slots)}
    programs = checkout.programs(env)
    register = "from pathlib import Path; from web.access.api_keys import KeyStore\n" + "\n".join(
        f"KeyStore(Path({str(home / 'data/keys.json')!r})).ensure({key!r}, {name!r}, ('infer',))"
        for name, key in KEYS.items()
    )
    checkout.run(["-c", register], env, 60)
    with ExitStack() as exits:
        processes: dict[str, Any] = {}

        def start(name: str, program: str, **more: str) -> Path:
            log = home / f"{name}.log"
            env_of = checkout.environment(**env, **more)
            processes[name] = exits.enter_context(process(programs[program], log, env_of, checkout.root))
            return log

        start("valkey", "valkey")
        log = start("web", "web")
        wait_for(f"http://127.0.0.1:{port}/livez", processes["web"], log)
        for index, model in enumerate(MODELS):
            start(model, "worker", MLXQ_WORKER_INDEX=str(index))
        running = Running(checkout, home, port)
        eventually(lambda: job_load.ready_models(running.endpoint("ann")) >= set(MODELS), "all models are ready", 60)
        yield running, processes


def undisturbed(checkout: Checkout) -> dict[str, str]:
    """Return the text of each request in an uninterrupted run."""
    with _folder() as home, started(checkout, home, slots=32) as (running, _):
        names = [name for name in ALL if name != "cancelled-running"]
        running.submit(*names)
        ended = {name: job_load.ended(running.endpoint(ALL[name].owner), [running.ids[name]], 60)[0] for name in names}
        return {name: str((job["output"] or {}).get("text") or "") for name, job in ended.items()}


def disturbed(checkout: Checkout, target: Path, texts: dict[str, str]) -> None:
    """Leave jobs in every state, kill everything, and keep the data in `target`."""
    with _folder() as home, started(checkout, home, slots=1) as (running, processes):
        running.submit(*(name for name in ENDED if name != "cancelled-running"))
        running.end(*(name for name in ENDED if name != "cancelled-running"))
        running.submit("cancelled-running")
        running.wait_for_text("cancelled-running")
        running.cancel("cancelled-running")
        running.end("cancelled-running")
        running.submit(*CUT, *WAITING)
        running.cancel("cancelled-waiting")
        running.end("cancelled-waiting")
        for name in CUT:
            running.wait_for_text(name)
        processes[MODELS[0]].kill()
        eventually(lambda: running.job("interrupted")["status"] == "queued", "the job waits again", 30)
        _compact(home)
        shown = {name: running.job(name) for name in ALL}
        for name in ("valkey", MODELS[1], "web"):
            processes[name].kill()
        _keep(home, target, running.ids, shown, texts)


def _compact(home: Path) -> None:
    """Make Valkey rewrite its append-only file as text, without deleted data."""
    with redis.Redis(unix_socket_path=str(home / "data/run/valkey.sock"), decode_responses=True) as client:
        client.config_set("aof-use-rdb-preamble", "no")
        client.bgrewriteaof()
        eventually(lambda: not _rewriting(client), "the append-only file is written", 30)


def _rewriting(client: Any) -> bool:
    info = client.info("persistence")
    return bool(info["aof_rewrite_in_progress"] or info["aof_rewrite_scheduled"])


def _keep(
    home: Path, target: Path, ids: dict[str, str], shown: dict[str, dict[str, Any]], texts: dict[str, str]
) -> None:
    shutil.rmtree(target / "valkey", ignore_errors=True)
    shutil.copytree(home / "data/valkey", target / "valkey")
    shutil.copy(home / "data/keys.json", target / "keys.json")
    jobs = {
        name: {
            "id": ids[name],
            "owner": request.owner,
            "status": shown[name]["status"],
            "attempt": shown[name]["attempt"],
            "partial_text": (shown[name]["output"] or {}).get("text") or "",
            "text": texts.get(name),
        }
        for name, request in ALL.items()
    }
    (target / "expected.json").write_text(json.dumps(jobs, indent=1, ensure_ascii=False) + "\n")


@contextmanager
def _folder() -> Iterator[Path]:
    # The path of a Unix socket is limited to about 100 characters, so pytest's folders are too deep.
    with tempfile.TemporaryDirectory(prefix="mlxq-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def main() -> None:
    """Create the stored data."""
    checkout, target = Checkout(Path(sys.argv[1]).resolve()), Path(sys.argv[2])
    target.mkdir(parents=True, exist_ok=True)
    disturbed(checkout, target, undisturbed(checkout))


if __name__ == "__main__":
    main()
