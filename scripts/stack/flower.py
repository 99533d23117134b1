"""Runs Flower with this project's settings: `python -m scripts.stack.flower`."""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import suppress
from typing import Any

import celery.__main__
import flower.options
import flower.views
from redis import RedisError
from tornado.options import options

from shared.load_settings import load_or_exit
from shared.redis.client import connect
from shared.redis.urls import is_redis


class RedisQueues:
    """Reads the lengths of queues for Flower's page of the broker.

    Flower's own clients have no user name for a Unix socket, and know only one sentinel.
    """

    def __init__(self, url: str) -> None:
        self._url = url

    async def queues(self, names: list[str]) -> list[dict[str, Any]]:
        """Return name and number of messages of each queue."""
        return await asyncio.to_thread(self._read, list(names))

    def _read(self, names: list[str]) -> list[dict[str, Any]]:
        with connect(self._url, timeout_s=2, retries=0) as client, client.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.llen(name)
            return [{"name": name, "messages": messages} for name, messages in zip(names, pipe.execute(), strict=True)]


def _delete_old_bindings(url: str) -> None:
    """Delete the queue names of earlier Flower processes: each start adds one. Events reach Flower by pub/sub."""
    with suppress(RedisError), connect(url, timeout_s=2, retries=0) as client:
        client.delete("_kombu.binding.celeryev")


def main() -> None:
    """Run Flower in this process.

    The password is set as an option, not in a variable or an argument: Flower splits variables at commas, and every
    user of the machine can read command lines.
    """
    settings = load_or_exit()
    password = settings.flower_password.get_secret_value()
    if not password:
        sys.exit("FLOWER_PASSWORD is empty: set it in the environment or .env")
    options.basic_auth = [f"{settings.flower_user}:{password}"]
    if is_redis(settings.celery_url):
        _delete_old_bindings(settings.celery_url)
        flower.views.Broker = lambda *_args, **_options: RedisQueues(settings.celery_url)
    no_file = f"--conf={os.devnull}"  # otherwise Flower executes flowerconfig.py from the current directory
    address = (f"--address={settings.flower_host}", f"--port={settings.flower_port}")
    sys.argv = ["celery", "-A", "shared.queue.wakeups:app", "flower", no_file, *address]
    celery.__main__.main()


if __name__ == "__main__":
    main()
