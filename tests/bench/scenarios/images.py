"""Images: each client sends an image with a question, then another question about the same image."""

from __future__ import annotations

import base64
import random
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from tests.bench.contenders import BARE, PEER, OwnStack
from tests.bench.plans import ChatRequest, closed
from tests.bench.samples import Figures
from tests.bench.scenarios.base import Scenario, Subject
from tests.bench.scenarios.closed_loop import case_name

WIDTH, HEIGHT, ANSWER_TOKENS = 300, 200, 64
"""Pixels of an image, tokens of an answer."""
AGAIN: Final = "the same images again"

CLIENTS: Final = (1, 16)
_TEXT_ONLY: Final = {PEER: "it serves text only", BARE: "it takes text only"}


class Images(Scenario):
    """Images that have not been sent before, and then the same ones again."""

    name = "images"
    needs_images = True

    def excluded(self, contender: str) -> str:
        """Contenders that take text only."""
        return _TEXT_ONLY.get(contender, "")

    def run(self, subject: Subject) -> Iterator[tuple[str, Figures]]:
        """A burst of clients, each with its own image, and a second burst with the same images."""
        subject.running.run(closed([[_Image.next(subject).request("Warm?")] for _ in range(2)]))
        for clients in CLIENTS:
            images = [_Image.next(subject) for _ in range(clients)]
            for case, question in (("", "What do you see?"), (f", {AGAIN}", "And what is in the corner?")):
                before = _encoded(subject)
                _, found = subject.measure(closed([[image.request(question)] for image in images]))
                ran = {} if before is None else {"images_encoded": (_encoded(subject) or 0.0) - before}
                yield case_name(clients) + case, {"clients": clients, **found, **ran}

    def remark(self, figures: Figures) -> str:
        """How often the encoder ran, if the contender reports it."""
        encoded = figures.get("images_encoded")
        return "" if encoded is None else f"{encoded:.0f} images encoded"


@dataclass(frozen=True, slots=True)
class _Image:
    number: int
    url: str

    @classmethod
    def next(cls, subject: Subject) -> _Image:
        """An image that has not been sent before."""
        number = next(subject.numbers)
        return cls(number, "data:image/png;base64," + base64.b64encode(png(WIDTH, HEIGHT, number)).decode())

    def request(self, question: str) -> ChatRequest:
        """The image first and then the question, as agents send screenshots: requests share a prefix."""
        content = [
            {"type": "image_url", "image_url": {"url": self.url}},
            # The number has a fixed width: mlx_vlm.server fails if Gemma 3's prompts differ in length.
            {"type": "text", "text": f"Picture {self.number:06}: {question}"},
        ]
        return ChatRequest([{"role": "user", "content": content}], ANSWER_TOKENS)


def _encoded(subject: Subject) -> float | None:
    """The number of images encoded so far; None if the contender does not report it."""
    if not isinstance(subject.running, OwnStack):
        return None
    return subject.running.metric("mlxq_worker_images_encoded_total")


def png(width: int, height: int, seed: int) -> bytes:
    """A PNG image of coloured stripes, which depends on the seed."""
    draw = random.Random(seed)
    stripe = [bytes(draw.randrange(256) for _ in range(3)) for _ in range(8)]
    rows = b"".join(b"\0" + b"".join(stripe[(x + y) // 8 % 8] for x in range(width)) for y in range(height))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
