"""scripts/smoke: its lines, its exit status, and that it keeps the key to itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from scripts.client.api import Refused, Unreachable
from tests.smoke import cli
from tests.smoke.probe import Wrong


def failing(error: Exception) -> Callable[[], None]:
    def check() -> None:
        raise error

    return check


def test_a_check_that_passes_is_a_line_with_a_tick(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run("ready", lambda: None)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("✓ ready ")
    assert line.endswith(" ms")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (Wrong("no worker"), "no worker"),
        (Unreachable("connection refused"), "connection refused"),
        (Refused(503, "unavailable", "Redis is away."), "Redis is away."),
        (KeyError("status"), "unexpected form"),
    ],
)
def test_a_check_that_fails_says_why(capsys: pytest.CaptureFixture[str], error: Exception, said: str) -> None:
    assert not cli.run("ready", failing(error))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("✗ ready ")
    assert said in line


def test_a_service_that_is_away_is_one_line_without_the_key(
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


def test_without_a_key_nothing_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--api-key-env", "NO_SUCH_VARIABLE"]) == 2
    assert "no API key" in capsys.readouterr().err
