"""Prints how to start a coding agent with this service, as shell commands; with --run, starts the agent.

No file of the agent is changed: everything is in its environment and its arguments. Arguments after the agent's name
that this command does not have are passed to the agent.

Exit status: that of the agent with --run; otherwise 0, or 1 if the service or the agent cannot be used.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from scripts.client import connection
from scripts.client.api import Client, ClientError
from shared.load_settings import load_or_exit
from shared.settings import Settings

PROVIDER: Final = "mlxq"
"""The service's name in configurations of agents."""


@dataclass(frozen=True, slots=True)
class Target:
    """The service and the model that an agent uses.

    Attributes:
        context: the model's context in tokens; None if unknown.
    """

    url: str
    key: str
    model: str
    context: int | None


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start an agent.

    Attributes:
        install: what to do if its command does not exist.
    """

    environment: Mapping[str, str]
    command: tuple[str, ...]
    install: str


def opencode(target: Target) -> Launch:
    """Return how to start opencode. Its provider is in a variable, which opencode merges with its configuration."""
    model: dict[str, Any] = {"name": target.model, "tool_call": True}
    if target.context is not None:
        model["limit"] = {"context": target.context, "output": target.context // 2}
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": PROVIDER,
        "options": {"baseURL": f"{target.url}/v1", "apiKey": "{env:MLXQ_API_KEY}"},
        "models": {target.model: model},
    }
    name = f"{PROVIDER}/{target.model}"
    configuration = {"provider": {PROVIDER: provider}, "model": name, "small_model": name}
    environment = {"MLXQ_API_KEY": target.key, "OPENCODE_CONFIG_CONTENT": json.dumps(configuration)}
    return Launch(environment, ("opencode",), "npm install -g opencode-ai")


def claude(target: Target) -> Launch:
    """Return how to start Claude Code."""
    models = ("ANTHROPIC_MODEL", *(f"ANTHROPIC_DEFAULT_{size}_MODEL" for size in ("OPUS", "SONNET", "HAIKU")))
    environment = {
        "ANTHROPIC_BASE_URL": target.url,
        "ANTHROPIC_AUTH_TOKEN": target.key,
        "ANTHROPIC_API_KEY": "",  # it would take precedence over the token
        **dict.fromkeys(models, target.model),
        # It would put a line into the system prompt that changes with every request, before everything cacheable.
        "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }
    return Launch(environment, ("claude", "--model", target.model), "npm install -g @anthropic-ai/claude-code")


def aider(target: Target) -> Launch:
    """Return how to start aider."""
    environment = {"OPENAI_API_BASE": f"{target.url}/v1", "OPENAI_API_KEY": target.key}
    command = ("aider", "--model", f"openai/{target.model}", "--no-show-model-warnings")
    return Launch(environment, command, "python -m pip install aider-chat")


def codex(target: Target) -> Launch:
    """Return how to start Codex, without the two kinds of tools that this service refuses."""
    provider = {
        "name": PROVIDER,
        "base_url": f"{target.url}/v1",
        "env_key": "MLXQ_API_KEY",
        "wire_api": "responses",
    }
    settings: dict[str, str] = {
        "model_provider": json.dumps(PROVIDER),
        **{f"model_providers.{PROVIDER}.{name}": json.dumps(value) for name, value in provider.items()},
        "web_search": '"disabled"',
        "features.multi_agent": "false",
    }
    if target.context is not None:
        settings["model_context_window"] = str(target.context)
    options = (part for name, value in settings.items() for part in ("-c", f"{name}={value}"))
    return Launch({"MLXQ_API_KEY": target.key}, ("codex", *options, "-m", target.model), "npm install -g @openai/codex")


AGENTS: Final[Mapping[str, Callable[[Target], Launch]]] = {
    "opencode": opencode,
    "claude": claude,
    "codex": codex,
    "aider": aider,
}


class CannotLaunch(Exception):
    """The service or the agent cannot be used. The message is one line that says why."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return the exit status."""
    inherited = dict(os.environ)  # the agent gets all of it; reading the settings removes variables of libraries
    settings = load_or_exit()
    options, agent_arguments = _parser(settings).parse_known_args(arguments)
    try:
        launch = AGENTS[options.agent](_target(options, settings))
        command = [*launch.command, *agent_arguments]
        if options.run:
            _run(launch, command, inherited)
    except ClientError as error:
        return _fail(f"{options.url} cannot be used: {error}")
    except (CannotLaunch, connection.NoKey, OSError) as error:
        return _fail(str(error))
    for name, value in launch.environment.items():
        print(f"export {name}={shlex.quote(value)}")
    print(shlex.join(command))
    return 0


def _target(options: argparse.Namespace, settings: Settings) -> Target:
    """Return the service with the requested model, or with its default model."""
    key = connection.api_key(options.api_key_env, settings)
    with Client(options.url, key) as client:
        models = client.request("GET", "/inference/models").json()["data"]
    for model in models:
        if model["default"] if options.model is None else options.model in (model["id"], *model["aliases"]):
            return Target(options.url, key, model["id"], model["context"])
    names = ", ".join(model["id"] for model in models)
    raise CannotLaunch(f"the service has no model {options.model or 'by default'}; it has {names or 'none'}")


def _run(launch: Launch, command: list[str], inherited: Mapping[str, str]) -> None:
    """Become the agent."""
    if shutil.which(command[0]) is None:
        raise CannotLaunch(f"{command[0]} is not on PATH; to install it: {launch.install}")
    os.execvpe(command[0], command, {**inherited, **launch.environment})


def _fail(reason: str) -> int:
    print(f"launch: {reason}", file=sys.stderr)
    return 1


def _parser(settings: Settings) -> argparse.ArgumentParser:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        "scripts/launch", description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("agent", choices=AGENTS)
    parser.add_argument("--run", action="store_true", help="start the agent")
    parser.add_argument("--model", help="id or alias of a model (default: the service's)")
    connection.add_options(parser, settings)
    return parser


if __name__ == "__main__":
    sys.exit(main())
