"""Everything on this machine, from nothing to ready and back: `scripts/serve`."""

from __future__ import annotations

import argparse
import os
import secrets
import sys
from collections.abc import Sequence

from scripts.stack import config, env_file, leftovers, preflight
from scripts.stack.failure import StartFailed
from scripts.stack.instance import sole_instance
from scripts.stack.model import add_vision_model, ensure_model
from scripts.stack.openblas import ensure_openblas
from scripts.stack.screen import Screen, base_url
from scripts.stack.signals import StopRequested, StopSignals
from scripts.stack.stack import Stack
from scripts.stack.supervision import SupervisorGone
from shared.environment import misspelled_names
from shared.models.catalog import load_catalog
from shared.settings import ENV_FILE, Settings
from web.access.api_keys import KeyStore, new_key


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until a signal comes.

    Args:
        arguments: the command line's, unless they are given.

    Returns:
        The exit status: 0 after an orderly end, 1 when it could not start or could not go on.
    """
    vision = _parser().parse_args(arguments).vision
    screen = Screen()
    signals = StopSignals()
    try:
        settings = preflight.settings_or_fail()
        preflight.prepare_data_dir(settings)
        if vision:
            settings = add_vision_model(settings)
        with sole_instance(settings.run_dir / "serve.lock", base_url(settings.host, settings.port)):
            _serve(settings, screen, signals)
    except StopRequested:
        screen.say("stopped; start again with scripts/serve")
        return 0
    except StartFailed as failure:
        screen.fail(str(failure))
    except SupervisorGone:
        screen.fail("supervisord is gone; everything was ended, and what was accepted is kept")
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/serve",
        description="Starts everything on this machine, keeps it running until Ctrl-C: queue, workers, API, Flower.",
    )
    parser.add_argument(
        "--vision", action="store_true", help="also serve models/ui-micro, a small model that reads screenshots"
    )
    return parser


def _serve(settings: Settings, screen: Screen, signals: StopSignals) -> None:
    for name, meant in misspelled_names(os.environ, Settings.model_fields).items():
        screen.say(f"{name} is not a setting and changes nothing; did you mean {meant}?")
    if ended := leftovers.end_all(settings.data_dir, patience_s=5):
        screen.say(f"ended {ended} processes that an earlier start had left behind")
    preflight.check_ports(settings)
    preflight.check_redis(settings)
    settings = _with_secrets(settings, screen)
    preflight.check_broker(settings)
    environment = config.child_environment(settings, leftovers.mark(settings.data_dir), ENV_FILE)
    for fault in load_catalog(settings).faults:
        screen.say(f"a model of the catalog is left out: {fault}")
    ensure_openblas(screen.say)
    ensure_model(settings, environment, signals)
    stack = Stack(settings, environment, screen, signals)
    try:
        stack.bring_up()
        screen.ready(settings, ENV_FILE, key_in_environment=bool(os.environ.get("MLXQ_API_KEY")))
        stack.watch()
    finally:
        stack.bring_down()


def _with_secrets(settings: Settings, screen: Screen) -> Settings:
    """On the first run, write a key and a password to `.env`; have the key accepted whatever DATA_DIR it meets."""
    wanted = {
        "MLXQ_API_KEY": settings.mlxq_api_key.get_secret_value() or new_key(),
        "FLOWER_PASSWORD": settings.flower_password.get_secret_value() or secrets.token_urlsafe(12),
    }
    missing = {name: value for name, value in wanted.items() if not getattr(settings, name.lower())}
    try:
        if missing:
            env_file.add_missing(ENV_FILE, missing)
            settings = preflight.settings_or_fail()
        key, store = settings.mlxq_api_key.get_secret_value(), KeyStore(settings.keys_file)
        store.ensure(key, name="local", scopes=("infer", "admin"))
        if store.find(key) is None:
            screen.say("MLXQ_API_KEY is revoked: take its line out of the file, and the next start makes a new one")
    except OSError as error:
        raise StartFailed(f"cannot write {error.filename}: {error.strerror}") from None
    except ValueError as error:
        raise StartFailed(f"MLXQ_API_KEY cannot be used: {error}") from None
    return settings


if __name__ == "__main__":
    sys.exit(main())
