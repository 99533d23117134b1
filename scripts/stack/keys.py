"""Create, list, limit and revoke API keys. A running service applies changes at once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from datetime import datetime
from typing import Final

from redis import RedisError

from shared.jobs.limits import OwnerLimits
from shared.jobs.record import Priority
from shared.load_settings import load_or_exit
from shared.redis.client import connect
from shared.settings import Settings
from web.access.api_keys import SCOPES, ApiKey, KeyStore
from web.access.purges import Purges

COLUMNS = ("id", "name", "scopes", "limit", "queue", "priority", "created", "revoked")
_LIMITS: Final = {
    "max_queued": "maximum number of waiting jobs per model (default: MAX_QUEUE_PER_KEY)",
    "max_queued_bytes": "maximum memory that unfinished jobs may reserve (default: QUEUE_BYTES_PER_KEY)",
    "max_running": "maximum number of running jobs; 0: unlimited (default: MAX_RUNNING_PER_KEY)",
    "tokens_per_minute": "tokens of prompts and answers per minute; 0: unlimited (default: TOKENS_PER_MINUTE_PER_KEY)",
    "tokens_per_day": "tokens of prompts and answers per day; 0: unlimited (default: TOKENS_PER_DAY_PER_KEY)",
}
_DEFAULT: Final = "default"
"""The value that removes a key's own limit."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return the exit status."""
    settings = load_or_exit()
    options = _parser(settings.rate_limit).parse_args(arguments)
    if options.action != "create" and not settings.keys_file.exists():
        return _fail(f"{settings.keys_file} does not exist; set DATA_DIR to that of the service")
    store = KeyStore(settings.keys_file)
    try:
        print(_ACTIONS[options.action](store, options, settings))
    except KeyError:
        return _fail(f"no {'' if options.action == 'show' else 'valid '}key has the id or name {options.key!r}")
    except (ValueError, OSError) as error:
        return _fail(str(error))
    return 0


def table(keys: Iterable[ApiKey], default_limit: str) -> str:
    """Format the keys as a table with a heading."""
    rows = [COLUMNS, *(_row(key, default_limit) for key in keys)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def describe(key: ApiKey, settings: Settings) -> str:
    """Format all limits of a key, one per line; those that are not its own with the setting's value in parentheses."""
    standard = key.limits.with_defaults(settings)
    rows = {
        "id": key.id,
        "name": key.name,
        "scopes": ",".join(sorted(key.scopes)),
        "created": _format_time(key.created_at),
        "revoked": "-" if key.revoked_at is None else _format_time(key.revoked_at),
        "max_priority": key.max_priority.label,
        "weight": f"{key.limits.weight:g}",
        "rate_limit": key.rate_limit or f"default ({settings.rate_limit})",
        **{name: _shown(name, getattr(key.limits, name), getattr(standard, name)) for name in _LIMITS},
    }
    return "\n".join(f"{name:18}{value}" for name, value in rows.items())


def _shown(name: str, own: int | None, effective: int) -> str:
    value = str(effective) if effective else "auto" if name == "max_queued_bytes" else "unlimited"
    return value if own is not None else f"default ({value})"


def _create(store: KeyStore, options: argparse.Namespace, settings: Settings) -> str:
    key = store.create(
        options.name,
        options.scope or ["infer"],
        options.rate_limit,
        limits=_with_options(OwnerLimits(), options),
        max_priority=Priority[(options.max_priority or Priority.NORMAL.label).upper()],
    )
    # stdout receives only the key, so that scripts can capture it.
    print(f"Added to {settings.keys_file}. The key is shown only once:", file=sys.stderr)
    return key


def _revoke(store: KeyStore, options: argparse.Namespace, settings: Settings) -> str:
    key = _find(store, options.key) if options.purge else store.revoke(options.key)
    if key.revoked_at is None:
        key = store.revoke(key.id)
    if options.purge:
        _purge(key, settings)
        return f"revoked {key.id} ({key.name}); the background process and the workers erase its data"
    return f"revoked {key.id} ({key.name})"


def _purge(key: ApiKey, settings: Settings) -> None:
    try:
        with connect(settings.store_url) as client:
            Purges(client).request(key.id)
    except RedisError as error:
        raise OSError(f"{key.id} is revoked, but its data is not erased: Redis cannot be used ({error})") from error


def _limit(store: KeyStore, options: argparse.Namespace, settings: Settings) -> str:
    def changed(key: ApiKey) -> ApiKey:
        rate = key.rate_limit if options.rate_limit is None else options.rate_limit
        return replace(
            key,
            rate_limit=None if rate == _DEFAULT else rate,
            limits=_with_options(key.limits, options),
            max_priority=key.max_priority if not options.max_priority else Priority[options.max_priority.upper()],
        )

    return describe(store.change(options.key, changed), settings)


def _with_options(limits: OwnerLimits, options: argparse.Namespace) -> OwnerLimits:
    """Return the limits with those that were given on the command line."""
    given = {name: value for name in _LIMITS if (value := getattr(options, name)) is not None}
    own = {name: None if value == _DEFAULT else value for name, value in given.items()}
    return replace(limits, **own, weight=limits.weight if options.weight is None else options.weight)


def _find(store: KeyStore, id_or_name: str) -> ApiKey:
    """Return a key by its id or name; of several with the same name, the valid one.

    Raises:
        KeyError: there is none.
    """
    found = [key for key in store.list() if id_or_name in (key.id, key.name)]
    if not found:
        raise KeyError(id_or_name)
    return max(found, key=lambda key: (key.revoked_at is None, key.created_at))


def _number(text: str) -> int | str:
    """Parse a limit: an integer, or `default`."""
    return text if text == _DEFAULT else int(text)


def _row(key: ApiKey, default_limit: str) -> tuple[str, ...]:
    return (
        key.id,
        key.name,
        ",".join(sorted(key.scopes)),
        key.rate_limit or default_limit,
        str(key.limits.max_queued or _DEFAULT),
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
    _add_limits(create, default_limit)
    actions.add_parser("list", help="list all keys, including revoked ones")
    show = actions.add_parser("show", help="show all limits of a key")
    show.add_argument("key", metavar="ID_OR_NAME")
    limit = actions.add_parser("limit", help="change limits of a key; `default` removes the key's own")
    limit.add_argument("key", metavar="ID_OR_NAME")
    _add_limits(limit, default_limit)
    revoke = actions.add_parser("revoke", help="revoke a key")
    revoke.add_argument("key", metavar="ID_OR_NAME")
    revoke.add_argument(
        "--purge",
        action="store_true",
        help="also erase its jobs, archived ones included, responses, files, batches and cached prefixes",
    )
    return parser


def _add_limits(parser: argparse.ArgumentParser, default_limit: str) -> None:
    parser.add_argument("--rate-limit", metavar="LIMIT", help=f"such as 1000/minute (default: {default_limit})")
    for name, text in _LIMITS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", metavar="N", type=_number, help=text)
    parser.add_argument("--weight", metavar="W", type=float, help="share relative to other keys (default: 1)")
    parser.add_argument(
        "--max-priority",
        choices=[priority.label for priority in Priority],
        help="highest priority of the key's jobs (default: normal)",
    )


_ACTIONS: Final[Mapping[str, Callable[[KeyStore, argparse.Namespace, Settings], str]]] = {
    "create": _create,
    "list": lambda store, _, settings: table(store.list(), settings.rate_limit),
    "show": lambda store, options, settings: describe(_find(store, options.key), settings),
    "limit": _limit,
    "revoke": _revoke,
}
"""What the command does, and returns what it prints, by the name of the action."""


def _fail(reason: str) -> int:
    print(f"keys: {reason}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
