"""Register webhook endpoints, and show and repeat deliveries: `scripts/webhooks add URL EVENT…`.

All actions except those on the deliveries of own jobs need an API key with the scope `admin`; name the variable that
has it with --api-key-env.
"""

from __future__ import annotations

import argparse
import sys
from datetime import datetime
from typing import Any

from scripts.client import connection
from scripts.client.api import Client, ClientError, Json
from shared.load_settings import load_or_exit
from shared.settings import Settings

_PATH = "/v1/webhooks"


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return the exit status."""
    settings = load_or_exit()
    options = _parser(settings).parse_args(arguments)
    try:
        with Client(options.url, connection.api_key(options.api_key_env, settings)) as client:
            _run(client, options)
    except (ClientError, connection.NoKey) as error:
        print(f"webhooks: {error}", file=sys.stderr)
        return 1
    return 0


def _run(client: Client, options: argparse.Namespace) -> None:
    if options.action in ("add", "rotate"):
        _print_secret(_create(client, options))
    elif options.action == "list":
        for each in client.request("GET", _PATH).json()["data"]:
            print(each["id"], each["url"], ",".join(each["events"]), each["description"])
    elif options.action == "remove":
        client.request("DELETE", f"{_PATH}/{options.id}")
    elif options.action == "deliveries":
        status = "pending" if options.pending else "dead"
        for each in client.request("GET", f"{_PATH}/deliveries?status={status}&limit=100").json()["data"]:
            print(_line(each))
    else:
        client.request("POST", f"{_PATH}/deliveries/{options.id}/resend")


def _create(client: Client, options: argparse.Namespace) -> Json:
    """Register an endpoint or rotate its secret; return the endpoint with its secret."""
    if options.action == "add":
        body = {"url": options.receiver, "events": options.events, "description": options.description}
        return dict(client.request("POST", _PATH, json=body).json())
    return dict(client.request("POST", f"{_PATH}/{options.id}/rotate", json={"overlap_s": options.overlap}).json())


def _print_secret(endpoint: Json) -> None:
    # stdout receives only the secret, so that scripts can capture it.
    print(f"{endpoint['id']}. The secret is shown only once:", file=sys.stderr)
    print(endpoint["secret"])


def _line(delivery: dict[str, Any]) -> str:
    created = datetime.fromtimestamp(delivery["created_at"]).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    attempts = f"{delivery['attempts']} attempts"
    reason = delivery["last_error"] or "-"
    return "  ".join(
        [delivery["id"], created, delivery["type"], delivery["object_id"], delivery["url"], attempts, reason]
    )


def _parser(settings: Settings) -> argparse.ArgumentParser:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser("scripts/webhooks", description=summary, epilog=rest)
    connection.add_options(parser, settings)
    actions = parser.add_subparsers(dest="action", required=True)
    add = actions.add_parser("add", help="register an endpoint and print its secret once")
    add.add_argument("receiver", metavar="URL")
    add.add_argument("events", metavar="EVENT", nargs="+", help="such as batch.completed; docs/webhooks.md lists all")
    add.add_argument("--description", default="")
    actions.add_parser("list", help="list the endpoints")
    for name, meaning in (("remove", "remove an endpoint"), ("rotate", "replace its secret and print the new one")):
        action = actions.add_parser(name, help=meaning)
        action.add_argument("id")
        if name == "rotate":
            action.add_argument(
                "--overlap", type=float, default=24 * 3600.0, metavar="S", help="seconds for which both are used"
            )
    deliveries = actions.add_parser("deliveries", help="list the newest 100 dead deliveries")
    deliveries.add_argument("--pending", action="store_true", help="list those that wait instead")
    resend = actions.add_parser("resend", help="send a dead delivery again")
    resend.add_argument("id")
    return parser


if __name__ == "__main__":
    sys.exit(main())
