"""Ctrl-C during Python's start and imports ends an executable without a traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from shared.settings import ROOT
from tests.support.waiting import eventually

INTERRUPT = "import os, signal; os.kill(os.getpid(), signal.SIGINT)"


def run_module(folder: Path, source: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a module through `scripts.lib.run`."""
    (folder / "command.py").write_text(source)
    return subprocess.run(
        [sys.executable, "-P", "-m", "scripts.lib.run", "command", *arguments],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    "source", [f"{INTERRUPT}\nprint('goes on')", f"def main():\n    {INTERRUPT}\n    print('goes on')"]
)
def test_an_interrupt_ends_the_process_silently(tmp_path: Path, source: str) -> None:
    ended = run_module(tmp_path, source)
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, "", "")


def test_a_module_can_handle_the_interrupt(tmp_path: Path) -> None:
    source = f"def main():\n    try:\n        {INTERRUPT}\n    except KeyboardInterrupt:\n        return 3"
    assert run_module(tmp_path, source).returncode == 3


def test_a_module_gets_its_arguments_and_its_status_is_returned(tmp_path: Path) -> None:
    ended = run_module(tmp_path, "import sys\ndef main():\n    print(sys.argv[1:])\n    return 4", "one", "two words")
    assert (ended.returncode, ended.stdout) == (4, "['one', 'two words']\n")


@pytest.mark.parametrize("name", ["serve", "fetch_model", "batch", "keys", "smoke"])
def test_an_interrupt_while_python_starts_prints_no_traceback(name: str) -> None:
    with subprocess.Popen(
        [ROOT / "scripts" / name, "--help"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as child:
        process = psutil.Process(child.pid)

        def python_starts() -> bool:
            return child.poll() is not None or "scripts.lib.run" in process.cmdline()

        eventually(python_starts, "the shell has become Python")
        child.send_signal(signal.SIGINT)
        assert child.stderr is not None
        assert child.stderr.read() == b""
