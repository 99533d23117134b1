"""Which service a command speaks to, and with which key: the same options for all of them."""

from __future__ import annotations

import argparse
import os

import httpx2

from shared.settings import Settings

KEY_VARIABLE = "MLXQ_API_KEY"


class NoKey(Exception):
    """There is no API key where one was to be; the message says what to do."""


def add_options(parser: argparse.ArgumentParser, settings: Settings) -> None:
    """Give a command `--url` and `--api-key-env`."""
    parser.add_argument(
        "--url", type=_url, default=local_url(settings.host, settings.port), help="where the API is (%(default)s)"
    )
    parser.add_argument(
        "--api-key-env",
        metavar="NAME",
        default=KEY_VARIABLE,
        help="variable that holds the API key (%(default)s, which may also stand in .env)",
    )


def local_url(host: str, port: int) -> str:
    """How something that listens there is reached from this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def api_key(variable: str, settings: Settings) -> str:
    """The key a variable holds.

    Raises:
        NoKey: it holds none.
    """
    local = settings.mlxq_api_key.get_secret_value()
    key = (local if variable == KEY_VARIABLE else os.environ.get(variable, "")).strip()
    if not key:
        raise NoKey(f"no API key: set {variable} (scripts/keys create NAME makes one)")
    if not key.isascii() or not key.isprintable():
        raise NoKey(f"{variable} holds no API key: it has characters that no key has")
    return key


def _url(text: str) -> str:
    try:
        url = httpx2.URL(text)
    except httpx2.InvalidURL as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if url.scheme not in ("http", "https") or not url.host:
        raise argparse.ArgumentTypeError(f"{text!r} is not like http://127.0.0.1:8080")
    return text.rstrip("/")
