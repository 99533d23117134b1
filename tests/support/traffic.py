"""What a call moves between Redis and this process, as the server itself counts it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from shared.queue.redis import Redis


@dataclass
class Traffic:
    """Filled when the block ends.

    Attributes:
        bytes_read: bytes that the server sent.
        commands: calls that it answered, those of pipelines one by one.
    """

    bytes_read: int = 0
    commands: int = 0


@contextmanager
def counted(client: Redis) -> Iterator[Traffic]:
    """Count what the server sends during the block, to anybody; there must be no others."""
    traffic = Traffic()
    first, before = _sent(client), _sent(client)
    question = before[0] - first[0]
    yield traffic
    after = _sent(client)
    traffic.bytes_read = after[0] - before[0] - question
    traffic.commands = after[1] - before[1] - 1


def _sent(client: Redis) -> tuple[int, int]:
    stats = client.info("stats")
    return int(stats["total_net_output_bytes"]), int(stats["total_commands_processed"])
