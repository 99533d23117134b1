"""The models to serve: the default model is fetched on the first run, `--vision` adds another."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from scripts.stack import preflight
from scripts.stack.failure import StartFailed
from scripts.stack.signals import StopSignals
from shared.models.catalog import load_catalog
from shared.models.folder import ModelError, check_folder
from shared.settings import ROOT, Settings

VISION = ROOT / "models/ui-micro"
"""The model that `--vision` adds; it is part of the repository."""


def add_vision_model(settings: Settings) -> Settings:
    """Add the vision model to the catalog and to WORKER_MODELS, for this process and its children."""
    catalog = load_catalog(settings)
    name = next((model.id for model in catalog.models.values() if model.path == VISION), VISION.name)
    if name not in catalog.models:
        os.environ["MODELS_FILE"] = str(_extended_catalog(settings))
        if catalog.default == settings.model_id:  # not in a catalog: it stays the default only if MODEL_PATH is set
            os.environ["MODEL_PATH"] = str(settings.model_path)
    lists = (settings.worker_models or catalog.default).split(";")
    os.environ["WORKER_MODELS"] = ";".join(each if name in each.split(",") else f"{each},{name}" for each in lists)
    return preflight.load_settings_or_fail()


def _extended_catalog(settings: Settings) -> Path:
    """Write a copy of the catalog with the vision model as its last entry."""
    file = settings.models_file
    entries = file.read_text("utf-8") if file.exists() else ""
    extended = settings.run_dir / "catalog.toml"
    extended.write_text(f'{entries}\n[models.{VISION.name}]\npath = "{VISION}"\n', "utf-8")
    return extended


def ensure_model(settings: Settings, environment: Mapping[str, str], signals: StopSignals) -> None:
    """Fetch the default model if it is missing.

    Raises:
        StartFailed: another model is missing or incomplete, or the fetch failed and has printed why.
    """
    if settings.modelless:
        return
    catalog = load_catalog(settings)
    path = catalog.models[catalog.default].path
    if (path / "config.json").is_file():
        _check(path)
        return
    if path != Settings.model_fields["model_path"].default:
        source = (
            "MODEL_PATH" if path == settings.model_path else f"{settings.models_file.name}: the default model's folder"
        )
        raise StartFailed(f"{source} {path} contains no model (no config.json); see scripts/fetch_model")
    fetch = subprocess.Popen([sys.executable, "-P", "-m", "scripts.model_files.fetch"], env=environment, cwd=ROOT)
    try:
        while fetch.poll() is None:
            signals.pause(0.2)
    finally:
        fetch.terminate()
        fetch.wait()
    if fetch.returncode != 0:
        raise StartFailed("the default model could not be fetched")


def _check(path: Path) -> None:
    """Check that the folder is complete; the worker would find out much later."""
    try:
        check_folder(path)
    except ModelError as error:
        raise StartFailed(f"the default model cannot be served: {error}") from None
