"""Images: a picture and a question from each client, and another question about the same picture."""

from __future__ import annotations

import base64
import random
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from tests.bench.contenders import BARE, PEER, OwnStack
from tests.bench.plans import Ask, closed
from tests.bench.samples import Figures
from tests.bench.scenarios.base import Scenario, Subject
from tests.bench.scenarios.closed_loop import case_name

WIDE, HIGH, ANSWER = 300, 200, 64
"""Pixels of a picture, tokens of an answer."""
AGAIN: Final = "the same images again"

CLIENTS: Final = (1, 16)
_BLIND = {PEER: "it serves text only", BARE: "it takes text only"}


class Images(Scenario):
    """Pictures that nobody has sent before, and then the same ones."""

    name = "images"
    sees = True

    def excludes(self, contender: str) -> str:
        """Who is blind."""
        return _BLIND.get(contender, "")

    def run(self, subject: Subject) -> Iterator[tuple[str, Figures]]:
        """A burst of a few clients, each with its own picture, and the same pictures with another question."""
        subject.running.run(closed([[_Picture.next(subject).ask("Warm?")] for _ in range(2)]))
        for clients in CLIENTS:
            pictures = [_Picture.next(subject) for _ in range(clients)]
            for case, question in (("", "What do you see?"), (f", {AGAIN}", "And what is in the corner?")):
                encoded = _encoded(subject)
                _, found = subject.measure(closed([[picture.ask(question)] for picture in pictures]))
                ran = {} if encoded is None else {"images_encoded": (_encoded(subject) or 0.0) - encoded}
                yield case_name(clients) + case, {"clients": clients, **found, **ran}

    def remark(self, figures: Figures) -> str:
        """How often the encoder ran, where the contender tells."""
        encoded = figures.get("images_encoded")
        return "" if encoded is None else f"{encoded:.0f} images encoded"


@dataclass(frozen=True, slots=True)
class _Picture:
    number: int
    url: str

    @classmethod
    def next(cls, subject: Subject) -> _Picture:
        """One that was not shown before."""
        number = next(subject.numbers)
        return cls(number, "data:image/png;base64," + base64.b64encode(png(WIDE, HIGH, number)).decode())

    def ask(self, question: str) -> Ask:
        """The picture, then the question: agents send a screenshot so, and what is shared is the beginning."""
        content = [
            {"type": "image_url", "image_url": {"url": self.url}},
            {"type": "text", "text": f"Picture {self.number}: {question}"},
        ]
        return Ask([{"role": "user", "content": content}], ANSWER)


def _encoded(subject: Subject) -> float | None:
    """How many images were encoded so far, of our own stack."""
    if not isinstance(subject.running, OwnStack):
        return None
    return subject.running.metric("mlxq_worker_images_encoded_total")


def png(wide: int, high: int, seed: int) -> bytes:
    """A picture of coloured stripes; another seed gives another picture."""
    draw = random.Random(seed)
    stripe = [bytes(draw.randrange(256) for _ in range(3)) for _ in range(8)]
    rows = b"".join(b"\0" + b"".join(stripe[(x + y) // 8 % 8] for x in range(wide)) for y in range(high))
    header = struct.pack(">IIBBBBB", wide, high, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
