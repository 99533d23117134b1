"""What `scripts/serve` shows: one screen on a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from scripts.stack.model import VISION
from shared.models.catalog import CatalogModel, load_catalog
from shared.settings import ROOT, Settings


class Progress(Protocol):
    """A line that changes while something takes long."""

    def update(self, status: str) -> None:
        """Show this now."""


class _Console(Console):
    """A console whose reader may go away (`scripts/serve | head`) without ending the stack."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class Screen:
    """The terminal. Without one, what takes long is said once, when it begins."""

    def __init__(self) -> None:
        self._out = _Console(highlight=False, soft_wrap=True)
        self._err = _Console(stderr=True, highlight=False, soft_wrap=True)

    def say(self, line: str) -> None:
        """One line that stays, unless the disk that it goes to is full."""
        with suppress(OSError):
            self._out.print(line, markup=False)

    def silence(self) -> None:
        """Nothing more is shown."""
        self._out.quiet = self._err.quiet = True

    def fail(self, reason: str) -> None:
        """Why it ends, on stderr."""
        for line in reason.splitlines():
            self._err.print(f"scripts/serve: {line}", markup=False)

    @contextmanager
    def waiting(self, text: str) -> Iterator[Progress]:
        """A spinner while the block runs."""
        if not self._out.is_terminal:
            self.say(f"{text} ...")
        with self._out.status(text, refresh_per_second=5) as status:
            yield status

    def ready(self, settings: Settings, env_file: Path, key_in_environment: bool) -> None:
        """Everything a person needs now."""
        base = base_url(settings.host, settings.port)
        file = shlex.quote(_shown(env_file))
        key = "$MLXQ_API_KEY" if key_in_environment else f"$(grep ^MLXQ_API_KEY= {file} | cut -d= -f2-)"
        where = "in the environment" if key_in_environment else f"in {_shown(env_file)}"
        workers = f"{settings.workers} worker{'s' if settings.workers > 1 else ''}"
        queue = "Valkey in DATA_DIR" if settings.embedded_redis else "REDIS_URL"
        made_up = " (BACKEND=fake: words of no meaning)" if settings.backend == "fake" else ""
        catalog = load_catalog(settings)
        of_each = (catalog.first(settings.worker_models, number)[0] for number in range(settings.workers))
        first = {model.id: model for models in of_each for model in models}
        text = first.get(catalog.default) or next(iter(first.values()), catalog.models[catalog.default])
        shown = {text.id: text} | {model.id: model for model in first.values() if model.path == VISION}
        command = f'curl -s {base}/inference -H "X-API-Key: {key}"'
        examples = "\n".join(
            f"{command} {_example(each, default=each.id == catalog.default)}" for each in shown.values()
        )
        self.say(f"""
  {", ".join(first)} {"is" if len(first) == 1 else "are"} ready{made_up}: {workers}, queue in {queue}

  API        {base}
  API docs   {base}/docs
  API key    MLXQ_API_KEY {where}
  Flower     {base_url(settings.host, settings.flower_port)}  user {settings.flower_user}, \
password FLOWER_PASSWORD in {_shown(env_file)}
  Data       {_shown(settings.data_dir)}
  Logs       {_shown(settings.log_dir)}

  Try it:
{examples}

  Ctrl-C ends everything (or: kill {os.getpid()}); jobs that are not done stay in the queue.
""")


def _example(model: CatalogModel, *, default: bool) -> str:
    """What asks a model something that it knows, as options of curl."""
    body: dict[str, Any] = {} if default else {"model": model.id}
    if model.path == VISION:
        body |= {"prompt": "click the red Save button", "temperature": 0}
        picture = ROOT / "docs/images/page.png"
        return f"-F images=@{shlex.quote(_shown(picture))} -F {shlex.quote(f'request={json.dumps(body)}')}"
    body["messages"] = [{"role": "user", "content": "What is the capital of France?"}]
    return f"-H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"


def base_url(host: str, port: int) -> str:
    """The URL for a client on this machine, also when the server listens on every address."""
    local = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{local}]:{port}" if ":" in local else f"http://{local}:{port}"


def _shown(path: Path) -> str:
    """A path as short as it works when pasted here."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
