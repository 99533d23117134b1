"""The default model in containers: `python -m scripts.stack.container_model fetch|serve`.

`fetch` puts it into a volume, `serve` becomes a worker that serves it from there. If MODEL_PATH, the catalog or the
mounted folder `models` provides a default model, `fetch` does nothing and `serve` uses that one.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final, NoReturn

from shared.load_settings import load_or_exit
from shared.models.catalog import load_catalog
from shared.settings import Settings

FETCHED: Final = Path("/fetched")
"""Mount point of the volume."""
STANDARD: Final[Path] = Settings.model_fields["model_path"].default


def must_be_fetched(settings: Settings, standard: Path = STANDARD) -> bool:
    """Whether the default model is the standard one, which no setting and no catalog names, and is not there."""
    if settings.modelless:
        return False
    catalog = load_catalog(settings)
    default = catalog.models[catalog.default]
    return default.path == standard and default.id == standard.name and not (standard / "config.json").is_file()


def fetch(settings: Settings) -> int:
    """Fetch the default model if nothing else provides one; return the exit status."""
    # Imported here: a worker that serves needs none of it.
    from scripts.model_files.fetch import main

    if not must_be_fetched(settings):
        print("the default model is not needed: MODEL_PATH, the catalog or the folder models has another")
        return 0
    return main(["--models-dir", str(FETCHED)])


def serve(settings: Settings) -> NoReturn:
    """Become a worker's launcher."""
    if must_be_fetched(settings):
        os.environ["MODEL_PATH"] = str(FETCHED / settings.model_path.name)
    os.execv(sys.executable, [sys.executable, "-m", "worker.process.launcher"])


def main(action: str) -> int:
    """Run an action; return the exit status."""
    return {"fetch": fetch, "serve": serve}[action](load_or_exit())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
