"""The options of client commands for the service's address and the API key."""

from __future__ import annotations

import argparse
import os

import httpx2

from shared.settings import Settings

KEY_VARIABLE = "MLXQ_API_KEY"


class NoKey(Exception):
    """The API key is missing or malformed. The message says what to do."""


def add_options(parser: argparse.ArgumentParser, settings: Settings) -> None:
    """Add `--url` and `--api-key-env` to a command."""
    parser.add_argument(
        "--url", type=_url, default=local_url(settings.host, settings.port), help="address of the API (%(default)s)"
    )
    parser.add_argument(
        "--api-key-env",
        metavar="NAME",
        default=KEY_VARIABLE,
        help="environment variable with the API key (%(default)s, which .env may set)",
    )


def local_url(host: str, port: int) -> str:
    """Return the URL under which this machine reaches a server that listens on a host and port."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def api_key(variable: str, settings: Settings) -> str:
    """Return the API key in a variable.

    Raises:
        NoKey: the variable is empty or contains invalid characters.
    """
    local = settings.mlxq_api_key.get_secret_value()
    key = (local if variable == KEY_VARIABLE else os.environ.get(variable, "")).strip()
    if not key:
        raise NoKey(f"no API key: set {variable} (scripts/keys create NAME creates one)")
    if not key.isascii() or not key.isprintable():
        raise NoKey(f"{variable} is not an API key: it contains other characters than keys do")
    return key


def _url(text: str) -> str:
    try:
        url = httpx2.URL(text)
    except httpx2.InvalidURL as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if url.scheme not in ("http", "https") or not url.host:
        raise argparse.ArgumentTypeError(f"{text!r} is not a URL such as http://127.0.0.1:8080")
    return text.rstrip("/")
