"""The stage before prefill of rows with images: encode an image, or some blocks of one, between two decode steps.

Files are decoded and cut into patches on a thread of their own, one image ahead of the encoder, so few are held as
pixels. What the encoder computed is kept for the next row of the same owner that shows the same image. Owners do not
share: the time to the first token reveals whether an image was cached.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

import mlx.core as mx

from shared.errors import JobFailure, PromptRefused
from shared.jobs.request import Request
from worker.runner.base import IMAGE_TOKENS, EncodeWork, Media, Row
from worker.runner.vision.family import Floats, VisionFamily
from worker.runner.vision.features import FeatureCache, Key
from worker.runner.vision.images import ImageMedia, PlacedImage

logger = logging.getLogger(__name__)

AHEAD_PATCHES = 2**14
"""Patches of waiting images that are decoded to pixels ahead (about 80 MB), at least two images."""
SHORT_S = 0.02
"""Longest time for encoding several whole images in one step; a pause of this length goes unnoticed."""
_NEARLY = 0.25
"""Part of a block by which a step may exceed its time: predictions are not exact, and one block less may halve it."""
_MISCOUNTED = "The text of a message contains the token that stands for an image, or the template leaves one out."


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


@dataclass(frozen=True, slots=True)
class Encoded:
    """What a step did.

    Attributes:
        predicted_s: what it takes, as measured; 0 where nothing was done.
        failed: rows whose images cannot be read; they are dropped.
    """

    predicted_s: float = 0.0
    failed: tuple[tuple[Row, Exception], ...] = ()


class VisionStage:
    """Rows whose images are not encoded yet.

    Args:
        cache_bytes: for what the encoder computed.
    """

    def __init__(self, family: VisionFamily, cache_bytes: int) -> None:
        self._family = family
        self._encoder = family.encoder
        self._cache = FeatureCache(cache_bytes)
        self._tasks: OrderedDict[Key, _Task] = OrderedDict()
        self._rows: dict[int, Row] = {}
        self._queued: list[mx.array] = []
        self._failed: list[tuple[Row, Exception]] = []
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="pixels")
        self._encoded = 0

    def place(
        self, tokens: Sequence[int], request: Request, images: Mapping[str, bytes]
    ) -> tuple[list[int], Media | None]:
        """Put the images of a request in the places of their tokens.

        Raises:
            PromptRefused: they do not fit the tokens, or the model takes no image of such a shape.
        """
        parts = request.image_parts
        if list(tokens).count(self._family.image_token) != len(parts):
            raise PromptRefused(JobFailure.TEMPLATE, _MISCOUNTED)
        if not parts:
            return list(tokens), None
        try:
            grids = [self._encoder.grid(part["width"], part["height"]) for part in parts]
        except ValueError as error:
            raise PromptRefused(JobFailure.TEMPLATE, f"The model takes no image of such a shape: {error}") from error
        shown = [(part["image"], grid, images[part["image"]]) for part, grid in zip(parts, grids, strict=True)]
        expanded, media = self._family.place(tokens, shown)
        if expanded[-1] >= IMAGE_TOKENS:
            raise PromptRefused(JobFailure.TEMPLATE, "The prompt ends with an image.")
        return expanded, media

    def bytes(self, media: Media | None) -> int:
        """Transient bytes for encoding these images one after another: those of the largest."""
        grids = {image.grid for image in media.images} if isinstance(media, ImageMedia) else set()
        return max(map(self._encoder.bytes, grids), default=0)

    def add(self, row: Row, cached: int) -> bool:
        """Take a row in, `cached` of whose tokens need no prefill; False when none of its images has to be encoded."""
        media = row.media
        if not isinstance(media, ImageMedia):
            return False
        for image in media.unread(cached):
            key = (row.owner, image.digest)
            if (features := self._cache.get(key)) is not None:
                media.features[image.digest] = features
            else:
                self._tasks.setdefault(key, _Task(key, image)).rows.append(row)
                self._rows[row.uid] = row
        self._look_ahead()
        return row.uid in self._rows

    def ready(self) -> list[Row]:
        """Take out the rows whose images are all encoded, or queued on the device."""
        waiting = {row.uid for task in self._tasks.values() for row in task.rows}
        return [self._rows.pop(uid) for uid in [*self._rows] if uid not in waiting]

    def next_pixels(self) -> Future[Floats] | None:
        """Pixels of the next image, which may still be on their way."""
        task = next(iter(self._tasks.values()), None)
        return task.pixels if task else None

    def waiting_s(self) -> float | None:
        """Seconds that the rest of the next image takes; None when none can be encoded now."""
        task = self._next()
        if task is None:
            return None
        return self._encoder.seconds(task.image.grid) * (1 - task.done / self._encoder.blocks)

    def advance(self, work: EncodeWork | None) -> Encoded:
        """Queue the next image, several small ones, or some blocks of a large one."""
        task = self._next() if work else None
        if task is None or work is None:
            return Encoded(failed=self._take_failed())
        mx.eval(self._queued)  # no more than one step ahead of the device
        self._queued = []
        if work.seconds is not None:
            took = self._deepen(task, self._blocks_in(work.seconds, task))
        else:
            took = self._whole(task)
        return Encoded(took, self._take_failed())

    def _blocks_in(self, seconds: float, task: _Task) -> int:
        blocks, cost = self._encoder.blocks, self._encoder.seconds(task.image.grid)
        return max(int(blocks * min(seconds / max(cost, 1e-9), 1.0) + _NEARLY), 1)

    def _whole(self, task: _Task | None) -> float:
        took = 0.0  # also after an image that could not be read
        while task is not None and (took == 0.0 or took + self._encoder.seconds(task.image.grid) <= SHORT_S):
            took += self._deepen(task, self._encoder.blocks)
            task = self._next()
        return took

    def _next(self) -> _Task | None:
        """The first in line, if its pixels are there."""
        task = next(iter(self._tasks.values()), None)
        return task if task is not None and task.pixels is not None and task.pixels.done() else None

    def _deepen(self, task: _Task, blocks: int) -> float:
        """Queue up to `blocks` more blocks of an image; their predicted seconds."""
        if task.under_way is None:
            assert task.pixels is not None  # noqa: S101 - `_next` gave it
            try:
                pixels = task.pixels.result()
            except Exception as error:  # decoders raise anything, and it is these rows' own
                logger.warning("image_not_read", exc_info=error)
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
        """Drop every row and all that was encoded."""
        self.remove([*self._rows])
        self._queued = []
        self._failed = []
        self._cache.clear()

    def allow(self, cache_bytes: int) -> None:
        """Limit the cache of encoded images."""
        self._cache.allow(cache_bytes)

    def warming(self) -> Iterator[None]:
        """Compile and measure the encoder; in pieces."""
        return self._encoder.warming()

    def stats(self) -> dict[str, float]:
        """Counters and gauges for `/metrics`."""
        return {
            "images_encoded_total": self._encoded,
            "image_cache_hits_total": self._cache.hits,
            "image_cache_bytes": self._cache.nbytes,
        }

    def close(self) -> None:
        """End the thread."""
        self._threads.shutdown(wait=False, cancel_futures=True)

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
                task.pixels = self._threads.submit(self._encoder.pixels, task.image)
