"""Checkouts of this repository: the present one, and optionally an earlier one to compare with.

Both run in this Python environment, so their requirements must be compatible.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from shared.settings import ROOT
from tests.bench.processes import NotUp

_PROGRAMS: Final = """
import json
try:
    from scripts.stack.config import programs, valkey_conf, valkey_conf_path
except ImportError:
    from scripts.commands.stack.config import programs, valkey_conf, valkey_conf_path
from shared.settings import Settings
settings = Settings()
settings.run_dir.mkdir(parents=True, exist_ok=True)
(settings.data_dir / "valkey").mkdir(exist_ok=True)
valkey_conf_path(settings).write_text(valkey_conf(settings))
print(json.dumps({each.name: each.command for each in programs(settings)}))
"""


@dataclass(frozen=True, slots=True)
class Checkout:
    """A folder with this repository at some commit."""

    root: Path = ROOT

    @property
    def commit(self) -> str:
        """The abbreviated commit; empty outside of git."""
        found = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=self.root, capture_output=True, text=True, check=False
        )
        return found.stdout.strip()

    @property
    def serve(self) -> list[str]:
        """The command of `scripts/serve`, without the installation of requirements."""
        return [sys.executable, "-m", self._module("scripts.stack.serve", "scripts.commands.serve")]

    def environment(self, **variables: str) -> dict[str, str]:
        """Environment variables for its processes, which import this checkout's modules only."""
        return {**variables, "PYTHONPATH": str(self.root)}

    def programs(self, variables: dict[str, str]) -> dict[str, list[str]]:
        """The commands that its `scripts/serve` runs, by name; writes Valkey's configuration."""
        found: dict[str, list[str]] = json.loads(self.run(["-c", _PROGRAMS], variables, 60))
        return found

    def module_output(self, module: str, arguments: Sequence[str], timeout_s: float) -> Any:
        """The JSON that one of its bench modules prints.

        Raises:
            NotUp: it failed.
        """
        name = self._module(f"tests.bench.{module}", f"scripts.commands.benching.{module}")
        return json.loads(self.run(["-m", name, *arguments], {}, timeout_s))

    def _module(self, now: str, earlier: str) -> str:
        """The module's name in this checkout: before the bench moved to `tests`, modules had other names."""
        return now if (self.root / f"{now.replace('.', '/')}.py").exists() else earlier

    def run(self, arguments: Sequence[str], variables: dict[str, str], timeout_s: float) -> str:
        """Run Python in its folder; its standard output.

        Raises:
            NotUp: it failed; `log` is the end of its standard error.
        """
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=self.root,
            env={**os.environ, **self.environment(**variables)},
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
        )
        if done.returncode:
            raise NotUp(f"{arguments[1]} failed in {self.root}", done.stderr[-2000:])
        return done.stdout
