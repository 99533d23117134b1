"""The systemd and launchd units in deploy/ are valid, and agree with the programs that they run."""

from __future__ import annotations

import configparser
import plistlib
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from scripts.stack.config import programs, total_stop_s
from shared.settings import ROOT, Settings
from worker.process.exits import EXIT_CONFIG

DEPLOY = ROOT / "deploy"
SETTINGS = Settings(_env_file=None)
WORKER_STOP_S = next(program.stop_wait_s for program in programs(SETTINGS) if program.name == "worker")
UNITS = ("mlxq.service", "mlxq-worker.service")


def service(unit: str) -> dict[str, str]:
    parser = configparser.ConfigParser()
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # names in units are case-sensitive
    parser.read_string((DEPLOY / unit).read_text())
    return dict(parser["Service"])


@pytest.fixture
def launch_agent() -> dict[str, Any]:
    content: dict[str, Any] = plistlib.loads((DEPLOY / "org.mlxq.serve.plist").read_bytes())
    return content


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize("unit", UNITS)
def test_systemd_accepts_the_unit(unit: str, tmp_path: Path) -> None:
    installed = tmp_path / unit
    installed.write_text((DEPLOY / unit).read_text().replace("/opt/mlxq", str(ROOT)))
    command = ["systemd-analyze", "verify", "--man=no", str(installed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("unit", "stop_s"), [(UNITS[0], total_stop_s(SETTINGS)), (UNITS[1], WORKER_STOP_S)])
def test_systemd_waits_for_the_end_of_the_programs(unit: str, stop_s: int) -> None:
    assert int(service(unit)["TimeoutStopSec"]) > stop_s


@pytest.mark.parametrize("unit", UNITS)
def test_units_start_existing_programs_without_privileges(unit: str) -> None:
    settings = service(unit)
    assert (ROOT / Path(settings["ExecStart"]).relative_to("/opt/mlxq")).is_file()
    assert settings["User"] != "root" and settings["NoNewPrivileges"] == "true"
    assert (settings["ProtectSystem"], settings["ReadWritePaths"]) == ("strict", "/opt/mlxq")


def test_a_worker_without_a_model_is_not_restarted() -> None:
    assert service("mlxq-worker.service")["RestartPreventExitStatus"] == str(EXIT_CONFIG)


def test_launchd_keeps_the_stack_running(launch_agent: dict[str, Any]) -> None:
    (program,) = launch_agent["ProgramArguments"]
    assert (ROOT / Path(program).relative_to(launch_agent["WorkingDirectory"])).is_file()
    assert launch_agent["Label"] == "org.mlxq.serve"
    assert launch_agent["KeepAlive"] == {"SuccessfulExit": False}
    assert launch_agent["ExitTimeOut"] > total_stop_s(SETTINGS)
