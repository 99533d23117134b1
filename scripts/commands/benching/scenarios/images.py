"""Images: small pictures and a question to each, for contenders that see."""

from __future__ import annotations

import base64
import random
import struct
import zlib
from collections.abc import Iterator

from scripts.commands.benching.contenders import BARE, OWN, PEER
from scripts.commands.benching.plans import Ask, closed
from scripts.commands.benching.samples import Figures
from scripts.commands.benching.scenarios.base import Scenario, Subject
from scripts.commands.benching.scenarios.closed_loop import case_name

_SIDE = 224
_CLIENTS = (1, 4)
_BLIND = {OWN: "it has no vision yet", PEER: "it serves text only", BARE: "it takes text only"}


class Images(Scenario):
    """A picture each."""

    name = "images"
    sees = True

    def excludes(self, contender: str) -> str:
        """Who is blind."""
        return _BLIND.get(contender, "")

    def run(self, subject: Subject) -> Iterator[tuple[str, Figures]]:
        """A burst for each of a few numbers of clients."""
        for clients in _CLIENTS:
            asks = [[_ask(next(subject.numbers), subject.sizes.tokens)] for _ in range(clients)]
            _, found = subject.measure(closed(asks))
            yield case_name(clients), {"clients": clients, **found}


def _ask(number: int, tokens: int) -> Ask:
    picture = "data:image/png;base64," + base64.b64encode(png(_SIDE, number)).decode()
    content = [
        {"type": "text", "text": f"Picture {number}: what do you see?"},
        {"type": "image_url", "image_url": {"url": picture}},
    ]
    return Ask([{"role": "user", "content": content}], tokens)


def png(side: int, seed: int) -> bytes:
    """A square picture of coloured stripes; another seed gives another picture."""
    draw = random.Random(seed)
    stripe = [bytes(draw.randrange(256) for _ in range(3)) for _ in range(8)]
    rows = b"".join(b"\0" + b"".join(stripe[(x + y) // 8 % 8] for x in range(side)) for y in range(side))
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
