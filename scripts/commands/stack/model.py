"""The model folder, filled on the first run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping

from scripts.commands.stack.failure import StartFailed
from scripts.commands.stack.signals import StopSignals
from shared.model_folder import ModelError, check_folder
from shared.settings import ROOT, Settings


def ensure_model(settings: Settings, environment: Mapping[str, str], signals: StopSignals) -> None:
    """Fetch the default model when it is not there.

    Raises:
        StartFailed: another model is missing or not whole, or the fetch failed; its own lines have said why.
    """
    if settings.backend == "fake":
        return
    if (settings.model_path / "config.json").is_file():
        _check(settings)
        return
    if settings.model_path != Settings.model_fields["model_path"].default:
        raise StartFailed(f"MODEL_PATH {settings.model_path} holds no model (no config.json); see scripts/fetch_model")
    fetch = subprocess.Popen([sys.executable, "-m", "scripts.commands.fetch_model"], env=environment, cwd=ROOT)
    try:
        while fetch.poll() is None:
            signals.pause(0.2)
    finally:
        fetch.terminate()
        fetch.wait()
    if fetch.returncode != 0:
        raise StartFailed("the default model could not be fetched")


def _check(settings: Settings) -> None:
    """See that the folder is whole before anything is started: the worker would find it out much later."""
    try:
        check_folder(settings.model_path)
    except ModelError as error:
        raise StartFailed(f"MODEL_PATH cannot be served: {error}") from None
