"""Flower is started with this project's settings."""

from __future__ import annotations

import sys

import celery.__main__
import pytest

from scripts.stack import flower


def test_flower_listens_on_loopback_even_if_the_api_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOST", "0.0.0.0")
    monkeypatch.setenv("FLOWER_PASSWORD", "secret")
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(celery.__main__, "main", lambda: None)
    flower.main()
    assert "--address=127.0.0.1" in sys.argv
    monkeypatch.setenv("FLOWER_HOST", "192.0.2.1")
    flower.main()
    assert "--address=192.0.2.1" in sys.argv
