"""The model folder, filled on the first run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping

from scripts.commands.stack.failure import StartFailed
from scripts.commands.stack.signals import StopSignals
from shared.settings import ROOT, Settings


def ensure_model(settings: Settings, environment: Mapping[str, str], signals: StopSignals) -> None:
    """Fetch the default model when it is not there.

    Raises:
        StartFailed: another model is missing, or the fetch failed; its own lines have said why.
    """
    if (settings.model_path / "config.json").is_file():
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
