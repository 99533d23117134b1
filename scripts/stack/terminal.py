"""The output of `scripts/serve`: a status line on a terminal, plain lines elsewhere."""

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


class Status(Protocol):
    """A line that shows what is being done."""

    def update(self, status: str) -> None:
        """Change the text."""


class _Console(Console):
    """A console that falls silent when its reader exits (`scripts/serve | head`); the stack keeps running."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class Terminal:
    """stdout and stderr of this process."""

    def __init__(self) -> None:
        self._out = _Console(highlight=False, soft_wrap=True)
        self._err = _Console(stderr=True, highlight=False, soft_wrap=True)

    def print(self, line: str) -> None:
        """Print a line, unless stdout is a file on a full disk."""
        with suppress(OSError):
            self._out.print(line, markup=False)

    def print_error(self, reason: str) -> None:
        """Print lines to stderr, each prefixed with the command's name."""
        for line in reason.splitlines():
            self._err.print(f"scripts/serve: {line}", markup=False)

    def mute(self) -> None:
        """Print nothing from now on."""
        self._out.quiet = self._err.quiet = True

    @contextmanager
    def status(self, text: str) -> Iterator[Status]:
        """Show a spinner with a text while the block runs; without a terminal, print the text once."""
        if not self._out.is_terminal:
            self.print(f"{text} ...")
        with self._out.status(text, refresh_per_second=5) as status:
            yield status

    def print_ready(self, settings: Settings, env_file: Path, key_in_environment: bool) -> None:
        """Print addresses, credentials and example commands."""
        base = base_url(settings.host, settings.port)
        key_source = "the environment" if key_in_environment else _relative(env_file)
        workers = f"{settings.workers} worker{'s' if settings.workers > 1 else ''}"
        queue = "Valkey in DATA_DIR" if settings.embedded_redis else "REDIS_URL"
        fake = f" (BACKEND={settings.backend}: no model)" if settings.modelless else ""
        loaded = _loaded_models(settings)
        examples = "\n".join(_examples(settings, loaded, _key_in_shell(env_file, key_in_environment)))
        self.print(f"""
  {", ".join(loaded)} {"is" if len(loaded) == 1 else "are"} ready{fake}: {workers}, queue in {queue}

  API        {base}  documentation: {base}/docs
  Console    {base}/  sign in with the API key
  API key    MLXQ_API_KEY in {key_source}
  Flower     {base_url(settings.flower_host, settings.flower_port)}  user {settings.flower_user}, \
password FLOWER_PASSWORD in {_relative(env_file)}
  Data       {_relative(settings.data_dir)}
  Logs       {_relative(settings.log_dir)}

  Try it:
{examples}

  Ctrl-C ends everything (or: kill {os.getpid()}); unfinished jobs stay in the queue.
""")


def base_url(host: str, port: int) -> str:
    """Return the URL for clients on this machine, also if the server listens on all addresses."""
    local = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{local}]:{port}" if ":" in local else f"http://{local}:{port}"


def _loaded_models(settings: Settings) -> dict[str, CatalogModel]:
    """Return the models that the workers load when they start, by id."""
    catalog = load_catalog(settings)
    models = (catalog.first(settings.worker_models, index)[0] for index in range(settings.workers))
    return {model.id: model for each in models for model in each}


def _key_in_shell(env_file: Path, key_in_environment: bool) -> str:
    """Return a shell expression for the API key, so that the key itself is not shown."""
    if key_in_environment:
        return "$MLXQ_API_KEY"
    return f"$(grep ^MLXQ_API_KEY= {shlex.quote(_relative(env_file))} | cut -d= -f2-)"


def _examples(settings: Settings, loaded: dict[str, CatalogModel], key: str) -> Iterator[str]:
    """Generate a curl command for the default model, or else the first one, and one for the vision model."""
    catalog = load_catalog(settings)
    first = loaded.get(catalog.default) or next(iter(loaded.values()), catalog.models[catalog.default])
    vision = {model.id: model for model in loaded.values() if model.path == VISION}
    # -sS: no progress bar, but errors such as a wrong port.
    command = f'curl -sS {base_url(settings.host, settings.port)}/inference -H "X-API-Key: {key}"'
    for model in ({first.id: first} | vision).values():
        yield f"{command} {_curl_options(model, default=model.id == catalog.default)}"


def _curl_options(model: CatalogModel, *, default: bool) -> str:
    """Return curl options for a request that the model answers well."""
    body: dict[str, Any] = {} if default else {"model": model.id}
    if model.path == VISION:
        body |= {"prompt": "click the red Save button", "temperature": 0}
        image = ROOT / "docs/images/page.png"
        return f"-F images=@{shlex.quote(_relative(image))} -F {shlex.quote(f'request={json.dumps(body)}')}"
    body["messages"] = [{"role": "user", "content": "What is the capital of France?"}]
    return f"-H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"


def _relative(path: Path) -> str:
    """Return the path relative to the current directory if it is below it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
