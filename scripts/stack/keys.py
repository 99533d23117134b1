"""Create, list and revoke API keys. A running service applies changes at once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

from shared.jobs.record import Priority
from shared.load_settings import load_or_exit
from web.access.api_keys import SCOPES, ApiKey, KeyStore

COLUMNS = ("id", "name", "scopes", "limit", "queue", "priority", "created", "revoked")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return the exit status."""
    settings = load_or_exit()
    options = _parser(settings.rate_limit).parse_args(arguments)
    if options.action != "create" and not settings.keys_file.exists():
        return _fail(f"{settings.keys_file} does not exist; set DATA_DIR to that of the service")
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
        return _fail(f"no valid key has the id or name {options.key!r}")
    except (ValueError, OSError) as error:
        return _fail(str(error))
    return 0


def table(keys: Iterable[ApiKey], default_limit: str) -> str:
    """Format the keys as a table with a heading."""
    rows = [COLUMNS, *(_row(key, default_limit) for key in keys)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _create(store: KeyStore, options: argparse.Namespace, file: Path) -> None:
    key = store.create(
        options.name,
        options.scope or ["infer"],
        options.rate_limit,
        max_queued=options.max_queued,
        max_priority=Priority[options.max_priority.upper()],
    )
    # stdout receives only the key, so that scripts can capture it.
    print(f"Added to {file}. The key is shown only once:", file=sys.stderr)
    print(key)


def _row(key: ApiKey, default_limit: str) -> tuple[str, ...]:
    return (
        key.id,
        key.name,
        ",".join(sorted(key.scopes)),
        key.rate_limit or default_limit,
        str(key.max_queued or "default"),
        key.max_priority.label,
        _format_time(key.created_at),
        _format_time(key.revoked_at) if key.revoked_at is not None else "-",
    )


def _format_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M")


def _parser(default_limit: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("scripts/keys", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    create = actions.add_parser("create", help="create a key and print it once")
    create.add_argument("name", help="name of the user or application")
    create.add_argument("--scope", action="append", choices=sorted(SCOPES), help="may be repeated (default: infer)")
    create.add_argument("--rate-limit", metavar="LIMIT", help=f"such as 1000/minute (default: {default_limit})")
    create.add_argument(
        "--max-queued",
        metavar="N",
        type=int,
        help="maximum number of waiting jobs per model (default: MAX_QUEUE_PER_KEY)",
    )
    create.add_argument(
        "--max-priority",
        choices=[priority.label for priority in Priority],
        default=Priority.NORMAL.label,
        help="highest priority of the key's jobs (default: normal)",
    )
    actions.add_parser("list", help="list all keys, including revoked ones")
    revoke = actions.add_parser("revoke", help="revoke a key")
    revoke.add_argument("key", metavar="ID_OR_NAME")
    return parser


def _fail(reason: str) -> int:
    print(f"keys: {reason}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
