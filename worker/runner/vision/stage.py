"""Rows whose images are not encoded yet: an image, or some blocks of one, between two decode steps.

Files are decoded and cut into patches on a thread of their own, one image ahead of the encoder, so few are held as
pixels. What the encoder made is kept for the next row of the same API key that shows the same image: whether it was
there can be told from the time to the first token, so keys do not share.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeAlias

import mlx.core as mx

from worker.engine.prefill_budget import Pace
from worker.runner.base import Row
from worker.runner.prefill import Chunk
from worker.runner.vision.images import ImageMedia, PlacedImage
from worker.runner.vision.qwen_encoder import Floats, ImageEncoder

logger = logging.getLogger(__name__)

Key: TypeAlias = tuple[str | None, str]
"""API key and digest."""

AHEAD_PATCHES = 2**14
"""Images with so many patches in all are decoded to pixels before their turn, some 80 MB, and two at least."""
SHORT_S = 0.02
"""What takes no longer, nobody sees: small images are encoded whole whatever decodes, as many as take so long."""
_PAUSE_S = 0.02
"""How long a step that has nothing else to do waits for pixels."""


class FeatureCache:
    """What the encoder made, the least recently used forgotten first.

    Args:
        most_bytes: what all may occupy; 0 keeps none.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._kept: OrderedDict[Key, mx.array] = OrderedDict()
        self.nbytes = 0
        self.hits = 0

    def get(self, key: Key) -> mx.array | None:
        """What is kept of an image."""
        features = self._kept.get(key)
        if features is not None:
            self.hits += 1
            self._kept.move_to_end(key)
        return features

    def put(self, key: Key, features: mx.array) -> None:
        """Keep it, unless it is too large or belongs to nobody."""
        if key[0] is None or features.nbytes > self._most_bytes or key in self._kept:
            return
        self._kept[key] = features
        self.nbytes += features.nbytes
        self._forget()

    def allow(self, most_bytes: int) -> None:
        """Have so much from now on."""
        self._most_bytes = most_bytes
        self._forget()

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()
        self.nbytes = 0

    def _forget(self) -> None:
        while self.nbytes > self._most_bytes:
            self.nbytes -= self._kept.popitem(last=False)[1].nbytes


@dataclass(slots=True)
class _Task:
    """An image to be encoded, and the rows that show it.

    Attributes:
        pixels: on their way; None while it is too early.
        under_way: its stages, once it has begun.
        done: blocks that were queued on the device.
    """

    key: Key
    image: PlacedImage
    rows: list[Row] = field(default_factory=list)
    pixels: Future[Floats] | None = None
    under_way: Iterator[mx.array] | None = None
    done: int = 0


class Encoding:
    """The stage before `worker.runner.prefill`, of rows with images.

    Args:
        pace: says how much may be done beside rows that decode.
        cache_bytes: for what the encoder made.
    """

    def __init__(self, encoder: ImageEncoder, pace: Pace, cache_bytes: int) -> None:
        self._encoder = encoder
        self._pace = pace
        self._cache = FeatureCache(cache_bytes)
        self._tasks: OrderedDict[Key, _Task] = OrderedDict()
        self._rows: dict[int, Row] = {}
        self._queued: list[mx.array] = []
        self._failed: list[tuple[Row, Exception]] = []
        self._hands = ThreadPoolExecutor(1, thread_name_prefix="pixels")
        self._encoded = 0

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, row: Row, done: int) -> bool:
        """Take a row in, `done` of whose tokens need not be read; False when nothing of it has to be encoded."""
        media = row.media
        if not isinstance(media, ImageMedia):
            return False
        for image in media.unread(done):
            key = (row.owner, image.digest)
            if (features := self._cache.get(key)) is not None:
                media.features[image.digest] = features
            else:
                self._tasks.setdefault(key, _Task(key, image)).rows.append(row)
                self._rows[row.uid] = row
        self._look_ahead()
        return row.uid in self._rows

    def ready(self) -> list[Row]:
        """Rows whose images are all encoded, or on the device's way."""
        waiting = {row.uid for task in self._tasks.values() for row in task.rows}
        return [self._rows.pop(uid) for uid in [*self._rows] if uid not in waiting]

    def advance(self, decoding: bool) -> Chunk | None:
        """Queue the next image, some small ones or some blocks of a large one; None when none is ready to be.

        Args:
            decoding: whether rows wait for their next token meanwhile.
        """
        task = self._next(idle=not decoding)
        if task is None or (decoding and self._is_long(task) and self._pace.rests()):
            return None
        mx.eval(self._queued)  # no more than one step ahead of the device
        self._queued = []
        if decoding and self._is_long(task):
            blocks = self._pace.part(self._encoder.seconds(task.image.grid), self._encoder.blocks)
            return Chunk(foretold=self._deepen(task, blocks), failed=self._take_failed())
        took = 0.0
        while task is not None and (took == 0.0 or took + self._encoder.seconds(task.image.grid) <= SHORT_S):
            took += self._deepen(task, self._encoder.blocks)
            task = self._next(idle=False)
        return Chunk(foretold=took, failed=self._take_failed())

    def _next(self, *, idle: bool) -> _Task | None:
        """The first in line, if its pixels are there."""
        task = next(iter(self._tasks.values()), None)
        if task is None or task.pixels is None:
            return None
        if idle:
            wait([task.pixels], _PAUSE_S)
        return task if task.pixels.done() else None

    def _is_long(self, task: _Task) -> bool:
        return self._encoder.seconds(task.image.grid) > SHORT_S

    def _deepen(self, task: _Task, blocks: int) -> float:
        """Queue so many more blocks of an image, if it has as many; what that takes."""
        if task.under_way is None:
            assert task.pixels is not None  # noqa: S101 - its turn came when they were there
            try:
                pixels = task.pixels.result()
            except Exception as error:  # decoders raise anything, and it is these rows' own
                logger.warning("an image cannot be read", exc_info=error)
                self._give_up(task, error)
                return 0.0
            task.under_way = self._encoder.stages(pixels, task.image.grid)
        made = min(blocks, self._encoder.blocks - task.done)
        *_, hidden = islice(task.under_way, made)
        task.done += made
        self._queued.append(hidden)
        mx.async_eval(hidden)  # type: ignore[no-untyped-call]
        if task.done == self._encoder.blocks:
            self._finish(task, hidden)
        return self._encoder.seconds(task.image.grid) * made / self._encoder.blocks

    def _finish(self, task: _Task, features: mx.array) -> None:
        self._encoded += 1
        for row in task.rows:
            if isinstance(row.media, ImageMedia):
                row.media.features[task.image.digest] = features
        self._cache.put(task.key, features)
        self._drop(task.key)

    def _give_up(self, task: _Task, error: Exception) -> None:
        """Fail the rows that show it."""
        self._drop(task.key)
        self._failed += [(row, error) for row in task.rows]
        self.remove([row.uid for row in task.rows])

    def _take_failed(self) -> tuple[tuple[Row, Exception], ...]:
        failed, self._failed = tuple(self._failed), []
        return failed

    def remove(self, uids: Collection[int]) -> None:
        """Drop rows, and the images that only they show."""
        for uid in uids:
            self._rows.pop(uid, None)
        for key, task in [*self._tasks.items()]:
            task.rows = [row for row in task.rows if row.uid not in uids]
            if not task.rows:
                self._drop(key)

    def clear(self) -> None:
        """Drop every row, and forget what was encoded."""
        self.remove([*self._rows])
        self._queued = []
        self._failed = []
        self._cache.clear()

    def allow(self, cache_bytes: int) -> None:
        """Keep so many bytes of what the encoder made, from now on."""
        self._cache.allow(cache_bytes)

    def stats(self) -> dict[str, float]:
        """Counters and gauges for `/metrics`."""
        return {
            "images_encoded_total": self._encoded,
            "image_cache_hits_total": self._cache.hits,
            "image_cache_bytes": self._cache.nbytes,
        }

    def close(self) -> None:
        """End the thread."""
        self._hands.shutdown(wait=False, cancel_futures=True)

    def _drop(self, key: Key) -> None:
        task = self._tasks.pop(key)
        if task.pixels is not None:
            task.pixels.cancel()
        self._look_ahead()

    def _look_ahead(self) -> None:
        """Have the next images decoded to pixels."""
        patches = 0
        for number, task in enumerate(self._tasks.values()):
            patches += task.image.grid.patches
            if number > 1 and patches > AHEAD_PATCHES:
                return
            if task.pixels is None:
                task.pixels = self._hands.submit(self._encoder.pixels, task.image)
