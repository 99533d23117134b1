"""`scripts/serve`: starts everything on this machine and keeps it running."""

from __future__ import annotations

import argparse
import os
import secrets
import sys
from collections.abc import Sequence

from scripts.stack import config, env_file, preflight, processes
from scripts.stack.failure import StartFailed
from scripts.stack.model import add_vision_model, ensure_model
from scripts.stack.openblas import ensure_openblas
from scripts.stack.signals import StopRequested, StopSignals
from scripts.stack.stack import Stack
from scripts.stack.supervision import SupervisorUnavailable
from scripts.stack.terminal import Terminal, base_url
from shared.environment import misspelled_names
from shared.models.catalog import load_catalog
from shared.settings import ENV_FILE, Settings
from web.access.api_keys import LOCAL_SCOPES, KeyFileDamaged, KeyStore, new_key


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until a stop signal arrives.

    Args:
        arguments: command-line arguments; None: those of this process.

    Returns:
        The exit status: 0 after a shutdown, 1 if the start failed or supervisord exited.
    """
    vision = _parser().parse_args(arguments).vision
    terminal = Terminal()
    signals = StopSignals()
    try:
        settings = preflight.load_settings_or_fail()
        preflight.prepare_data_dir(settings)
        if vision:
            settings = add_vision_model(settings)
        with preflight.single_instance(settings.run_dir / "serve.lock", base_url(settings.host, settings.port)):
            _serve(settings, terminal, signals)
    except StopRequested:
        terminal.print("stopped; start again with scripts/serve")
        return 0
    except StartFailed as failure:
        terminal.print_error(str(failure))
    except SupervisorUnavailable:
        terminal.print_error("supervisord has exited; all processes were ended, and accepted jobs are kept")
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/serve",
        description="Starts everything on this machine and keeps it running until Ctrl-C: queue, workers, API, Flower.",
    )
    parser.add_argument(
        "--vision", action="store_true", help="also serve models/ui-micro, a small model that reads screenshots"
    )
    return parser


def _serve(settings: Settings, terminal: Terminal, signals: StopSignals) -> None:
    for name, similar in misspelled_names(os.environ, Settings.model_fields).items():
        terminal.print(f"{name} is not a setting and has no effect; did you mean {similar}?")
    if ended := processes.terminate_all(settings.data_dir, grace_s=5):
        terminal.print(f"ended {ended} orphaned processes of an earlier start")
    preflight.check_ports(settings)
    preflight.check_redis(settings)
    settings = register_secrets(settings, terminal)
    preflight.check_broker(settings)
    environment = config.child_environment(settings, processes.stack_id(settings.data_dir), ENV_FILE)
    for fault in load_catalog(settings).faults:
        terminal.print(f"a catalog entry is skipped: {fault}")
    ensure_openblas(terminal.print)
    ensure_model(settings, environment, signals)
    stack = Stack(settings, environment, terminal, signals)
    try:
        stack.bring_up()
        terminal.print_ready(settings, ENV_FILE, key_in_environment=bool(os.environ.get("MLXQ_API_KEY")))
        stack.watch()
    finally:
        stack.bring_down()


def register_secrets(settings: Settings, terminal: Terminal) -> Settings:
    """Write missing secrets to `.env`, register the API key in DATA_DIR, and return the settings with both.

    Raises:
        StartFailed: a file cannot be written, the key file is damaged, or MLXQ_API_KEY is not a valid key.
    """
    missing = {
        name: value
        for name, value in {"MLXQ_API_KEY": new_key(), "FLOWER_PASSWORD": secrets.token_urlsafe(12)}.items()
        if not getattr(settings, name.lower())
    }
    try:
        if missing:
            env_file.add_missing(ENV_FILE, missing)
            settings = preflight.load_settings_or_fail()
        key, store = settings.mlxq_api_key.get_secret_value(), KeyStore(settings.keys_file)
        store.ensure(key, name="local", scopes=LOCAL_SCOPES)
        if store.find(key) is None:
            terminal.print(f"MLXQ_API_KEY is revoked: remove it from {ENV_FILE}, and the next start creates a new one")
    except OSError as error:
        raise StartFailed(f"cannot write {error.filename}: {error.strerror}") from None
    except KeyFileDamaged as error:
        raise StartFailed(str(error)) from None
    except ValueError as error:
        raise StartFailed(f"MLXQ_API_KEY cannot be used: {error}") from None
    return settings


if __name__ == "__main__":
    sys.exit(main())
