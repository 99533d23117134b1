"""Servers of other projects that are measured in environments of their own: what they need, and where they are.

They pin other versions of our libraries than we do, so `scripts/bench --install` makes a virtual environment for each.
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
    """A server with OpenAI's chat completions.

    Attributes:
        requirements: what is installed; the libraries that decide its speed are pinned beside it.
        module: has the `main` of its command line.
        options: of its `serve`, beside model, host and port.
        environment: variables that it is started with.
    """

    name: str
    requirements: tuple[str, ...]
    module: str
    options: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()

    @property
    def python(self) -> Path:
        """Its interpreter, installed or not."""
        return FOLDER / self.name / "bin/python"

    def missing(self) -> str:
        """Why it cannot be measured; empty when it can."""
        if self.python.exists():
            return ""
        return f"{self.name} is not installed; scripts/bench --install {self.name} does it (several GB)"

    def install(self) -> None:
        """Make its environment anew.

        Raises:
            subprocess.CalledProcessError: pip failed, and has said why.
        """
        folder = FOLDER / self.name
        shutil.rmtree(folder, ignore_errors=True)
        FOLDER.mkdir(exist_ok=True)
        try:
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
            subprocess.run([str(self.python), "-m", "pip", "install", *self.requirements], check=True)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)  # half of it would be taken for the whole
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
