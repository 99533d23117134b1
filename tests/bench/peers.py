"""Servers of other projects, each in its own virtual environment.

They pin other versions of our libraries than we do, so `scripts/bench --install` makes an environment for each.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shared.settings import ROOT

FOLDER: Final = ROOT / ".venv-peers"


@dataclass(frozen=True, slots=True)
class Peer:
    """A server that has OpenAI's chat completions.

    Attributes:
        requirements: what to install; the libraries that determine its speed are pinned too.
        module: the module with `main` of its command line.
        options: of its `serve` command, in addition to model, host and port.
        environment: environment variables.
    """

    name: str
    requirements: tuple[str, ...]
    module: str
    options: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()

    @property
    def python(self) -> Path:
        """Its Python interpreter, whether or not it is installed."""
        return FOLDER / self.name / "bin/python"

    def missing(self) -> str:
        """Why it cannot be measured; empty if it can."""
        if self.python.exists():
            return ""
        return f"{self.name} is not installed; run scripts/bench --install {self.name} (several GB)"

    def install(self) -> None:
        """Create its environment, replacing an earlier one.

        Raises:
            subprocess.CalledProcessError: pip failed; it has printed why.
        """
        folder = FOLDER / self.name
        shutil.rmtree(folder, ignore_errors=True)
        FOLDER.mkdir(exist_ok=True)
        try:
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
            subprocess.run([str(self.python), "-m", "pip", "install", *self.requirements], check=True)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)  # an incomplete environment would count as installed
            raise


_MLX: Final = ("mlx[cpu]==0.32.4", "mlx-lm==0.31.3")

PEERS: Final = {
    each.name: each
    for each in (
        Peer(
            "vllm-mlx",
            ("vllm-mlx==0.6.0", "mlx-vlm==0.7.10", "transformers==5.24.0", *_MLX),
            "vllm_mlx.cli",
            options=("--continuous-batching",),
        ),
        Peer(
            "rapid-mlx",
            ("rapid-mlx==0.16.10", "mlx-vlm==0.7.2", "transformers==5.15.1", *_MLX),
            "rapid_mlx.cli",
            options=("--log-level", "WARNING", "--yes"),
            environment=(("RAPID_MLX_TELEMETRY", "0"), ("DO_NOT_TRACK", "1")),
        ),
    )
}
