"""scripts/smoke: output, exit status, and that it never prints the key."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from scripts.client.api import Refused, Unreachable
from tests.smoke import cli
from tests.smoke.probe import CheckFailed


def failing(error: Exception) -> Callable[[], None]:
    def check() -> None:
        raise error

    return check


def test_a_passed_check_is_a_line_with_a_tick(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run("ready", lambda: None)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("✓ ready ")
    assert line.endswith(" ms")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (CheckFailed("no worker"), "no worker"),
        (Unreachable("connection refused"), "connection refused"),
        (Refused(503, "unavailable", "Redis is away."), "Redis is away."),
        (KeyError("status"), "unexpected form"),
    ],
)
def test_a_failed_check_prints_the_reason(capsys: pytest.CaptureFixture[str], error: Exception, reason: str) -> None:
    assert not cli.run("ready", failing(error))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("✗ ready ")
    assert reason in line


def test_an_unreachable_service_is_one_line_without_the_key(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OWN_KEY", "mlxq_secret")
    nowhere = "http://127.0.0.1:9"
    assert cli.main(["--url", nowhere, "--flower-url", nowhere, "--api-key-env", "OWN_KEY"]) == 2
    printed = capsys.readouterr()
    assert not printed.out
    (line,) = printed.err.splitlines()
    assert line.startswith(f"smoke: no service at {nowhere}: ")
    assert "secret" not in printed.out + printed.err


def test_a_missing_key_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--api-key-env", "NO_SUCH_VARIABLE"]) == 2
    assert "no API key" in capsys.readouterr().err
