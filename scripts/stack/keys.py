"""API keys: `scripts/keys create NAME`, `list`, `revoke ID_OR_NAME`. A running service heeds a change at once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

from shared.settings import load_or_exit
from web.access.api_keys import SCOPES, ApiKey, KeyStore

COLUMNS = ("id", "name", "scopes", "limit", "created", "revoked")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    settings = load_or_exit()
    options = _parser(settings.rate_limit).parse_args(arguments)
    if options.action != "create" and not settings.keys_file.exists():
        return _fail(f"there is no {settings.keys_file}; DATA_DIR must be that of the service")
    store = KeyStore(settings.keys_file)
    try:
        match options.action:
            case "create":
                _create(store, options, settings.keys_file)
            case "list":
                print(table(store.list(), settings.rate_limit))
            case "revoke":
                revoked = store.revoke(options.key)
                print(f"revoked {revoked.id} ({revoked.name})")
    except KeyError:
        return _fail(f"there is no key {options.key!r} in force")
    except (ValueError, OSError) as error:
        return _fail(str(error))
    return 0


def table(keys: Iterable[ApiKey], default_limit: str) -> str:
    """The keys under a heading, columns aligned."""
    rows = [COLUMNS, *(_row(key, default_limit) for key in keys)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _create(store: KeyStore, options: argparse.Namespace, file: Path) -> None:
    key = store.create(options.name, options.scope or ["infer"], options.rate_limit)
    # The key alone goes to stdout, so that a script can take it.
    print(f"Added to {file}. This key is shown only now:", file=sys.stderr)
    print(key)


def _row(key: ApiKey, default_limit: str) -> tuple[str, ...]:
    return (
        key.id,
        key.name,
        ",".join(sorted(key.scopes)),
        key.rate_limit or default_limit,
        _moment(key.created_at),
        _moment(key.revoked_at) if key.revoked_at is not None else "-",
    )


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M")


def _parser(default_limit: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("scripts/keys", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    create = actions.add_parser("create", help="make a key and print it, once")
    create.add_argument("name", help="who or what it is for")
    create.add_argument("--scope", action="append", choices=sorted(SCOPES), help="may be repeated; infer if not given")
    create.add_argument("--rate-limit", metavar="LIMIT", help=f"such as 1000/minute; {default_limit} if not given")
    actions.add_parser("list", help="show all keys, revoked ones too")
    revoke = actions.add_parser("revoke", help="make a key useless")
    revoke.add_argument("key", metavar="ID_OR_NAME")
    return parser


def _fail(reason: str) -> int:
    print(f"keys: {reason}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
