"""The stage before the prefill of rows with images: encodes an image, or some blocks of one, between two decode steps.

A thread decodes image files and cuts them into patches, a little ahead of the encoder so that few images are held as
pixels. Features are cached for later rows of the same owner with the same image. Owners do not share features: the time
to the first token reveals whether an image was cached.
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
from worker.runner.vision.features import FeatureCache, Key
from worker.runner.vision.half import Pixels, VisionHalf
from worker.runner.vision.images import ImageMedia, PlacedImage

logger = logging.getLogger(__name__)

AHEAD_PATCHES = 2**14
"""Patches of waiting images that are decoded ahead (about 80 MB); at least two images."""
SHORT_S = 0.02
"""Maximum seconds for encoding several whole images in one step. Readers do not notice a pause of this length."""
_ROUNDING = 0.25
"""Fraction of a block by which a step may exceed its time. With one block less, its time may halve."""
_PLACEHOLDERS = "A message contains the model's image placeholder as text, or the chat template omits an image."


@dataclass(slots=True)
class _Task:
    """An image to encode, and the rows that contain it.

    Attributes:
        pixels: the decoded image; None: decoding has not been requested yet.
        stages: iterator over the encoder's stages; None: encoding has not begun.
        done: number of blocks that were queued on the device.
    """

    key: Key
    image: PlacedImage
    rows: list[Row] = field(default_factory=list)
    pixels: Future[Pixels] | None = None
    stages: Iterator[mx.array] | None = None
    done: int = 0


@dataclass(frozen=True, slots=True)
class Encoded:
    """The encoding work that a step has done.

    Attributes:
        predicted_s: predicted seconds of the work; 0 if there was none. None: whole images, which have no time limit.
        failed: (row, error) of rows that were dropped because an image could not be decoded.
    """

    predicted_s: float | None = 0.0
    failed: tuple[tuple[Row, Exception], ...] = ()


class VisionStage:
    """Rows with images that are not encoded yet.

    Args:
        half: the image half of the model.
        cache_bytes: maximum bytes of cached features.
    """

    def __init__(self, half: VisionHalf, cache_bytes: int) -> None:
        self._half = half
        self._encoder = half.encoder
        self._cache = FeatureCache(cache_bytes)
        self._tasks: OrderedDict[Key, _Task] = OrderedDict()
        self._rows: dict[int, Row] = {}
        self._queued: list[mx.array] = []
        self._failed: list[tuple[Row, Exception]] = []
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="pixels")
        self._encoded = 0

    def expand(
        self, tokens: Sequence[int], request: Request, images: Mapping[str, bytes]
    ) -> tuple[list[int], Media | None]:
        """Replace the placeholder tokens of a request's images with image tokens.

        Args:
            images: file contents by digest.

        Returns:
            The token ids and the media of the prompt; None if it has no images.

        Raises:
            PromptRefused: the images do not match the placeholders, or the model does not support an aspect ratio.
        """
        parts = request.image_parts
        if list(tokens).count(self._half.image_token) != len(parts):
            raise PromptRefused(JobFailure.TEMPLATE, _PLACEHOLDERS)
        if not parts:
            return list(tokens), None
        try:
            layouts = [self._encoder.layout(part["width"], part["height"]) for part in parts]
        except ValueError as error:
            raise PromptRefused(
                JobFailure.TEMPLATE, f"The model does not support the shape of an image: {error}"
            ) from error
        sent = [
            PlacedImage(part["image"], layout, images[part["image"]], part["width"] * part["height"])
            for part, layout in zip(parts, layouts, strict=True)
        ]
        expanded, media = self._half.expand(tokens, sent)
        if expanded[-1] >= IMAGE_TOKENS:
            raise PromptRefused(JobFailure.TEMPLATE, "The prompt ends with an image.")
        return expanded, media

    def bytes(self, media: Media | None) -> int:
        """Return the temporary bytes for encoding these images one after the other: those of the largest image."""
        layouts = {image.layout for image in media.images} if isinstance(media, ImageMedia) else set()
        return max(map(self._encoder.bytes, layouts), default=0)

    def add(self, row: Row, cached: int) -> bool:
        """Add a row, unless all images that it needs are encoded already.

        Args:
            cached: number of its tokens that need no prefill.

        Returns:
            Whether the row was added.
        """
        media = row.media
        if not isinstance(media, ImageMedia):
            return False
        for image in media.not_prefilled(cached):
            key = (row.owner, image.digest)
            if (features := self._cache.get(key)) is not None:
                media.features[image.digest] = features
            else:
                self._tasks.setdefault(key, _Task(key, image)).rows.append(row)
                self._rows[row.uid] = row
        self._look_ahead()
        return row.uid in self._rows

    def ready(self) -> list[Row]:
        """Remove and return the rows with all images encoded or queued on the device."""
        waiting = {row.uid for task in self._tasks.values() for row in task.rows}
        return [self._rows.pop(uid) for uid in [*self._rows] if uid not in waiting]

    def next_pixels(self) -> Future[Pixels] | None:
        """Return the future of the next image's pixels; None if no image is being decoded."""
        task = next(iter(self._tasks.values()), None)
        return task.pixels if task else None

    def next_image_s(self) -> float | None:
        """Return the seconds that the rest of the next image takes; None if no image can be encoded now."""
        task = self._next()
        if task is None:
            return None
        return self._encoder.seconds(task.image.layout) * (1 - task.done / self._encoder.blocks)

    def advance(self, work: EncodeWork | None) -> Encoded:
        """Queue one image, several small ones, or some blocks of a large one."""
        task = self._next() if work else None
        if task is None or work is None:
            return Encoded(failed=self._take_failed())
        mx.eval(self._queued)  # stay at most one step ahead of the device
        self._queued = []
        if work.seconds is None:
            self._encode_whole(task)
            return Encoded(None, self._take_failed())
        predicted_s = self._advance_task(task, self._blocks_in(work.seconds, task))
        return Encoded(predicted_s, self._take_failed())

    def _blocks_in(self, seconds: float, task: _Task) -> int:
        blocks, cost = self._encoder.blocks, self._encoder.seconds(task.image.layout)
        return max(int(blocks * min(seconds / max(cost, 1e-9), 1.0) + _ROUNDING), 1)

    def _encode_whole(self, task: _Task | None) -> None:
        """Queue the rest of an image and further small images."""
        predicted_s = 0.0  # stays 0 after images that could not be decoded
        while task and (predicted_s == 0.0 or predicted_s + self._encoder.seconds(task.image.layout) <= SHORT_S):
            predicted_s += self._advance_task(task, self._encoder.blocks)
            task = self._next()

    def _next(self) -> _Task | None:
        """Return the first image in the queue if it has been decoded."""
        task = next(iter(self._tasks.values()), None)
        return task if task is not None and task.pixels is not None and task.pixels.done() else None

    def _advance_task(self, task: _Task, max_blocks: int) -> float:
        """Queue up to `max_blocks` more blocks of an image. Returns their predicted seconds."""
        if task.stages is None and (error := self._start(task)) is not None:
            logger.warning("image_not_read", exc_info=error)
            self._fail(task, error)
            return 0.0
        assert task.stages is not None  # noqa: S101 - it was started
        blocks = min(max_blocks, self._encoder.blocks - task.done)
        *_, hidden = islice(task.stages, blocks)
        task.done += blocks
        self._queued.append(hidden)
        mx.async_eval(hidden)  # type: ignore[no-untyped-call]
        if task.done == self._encoder.blocks:
            self._finish(task, hidden)
        return self._encoder.seconds(task.image.layout) * blocks / self._encoder.blocks

    def _start(self, task: _Task) -> Exception | None:
        """Begin to encode an image. Returns the error if it cannot be read, which fails only its rows."""
        assert task.pixels is not None  # noqa: S101 - `_next` checks it
        try:
            pixels = task.pixels.result()
        except Exception as error:  # noqa: BLE001 - decoders raise any exception
            return error
        try:
            task.stages = self._encoder.stages(pixels, task.image.layout)
        except ValueError as error:
            return error
        return None

    def _finish(self, task: _Task, features: mx.array) -> None:
        self._encoded += 1
        for row in task.rows:
            if isinstance(row.media, ImageMedia):
                row.media.features[task.image.digest] = features
        self._cache.put(task.key, features)
        self._drop(task.key)

    def _fail(self, task: _Task, error: Exception) -> None:
        """Fail the rows that contain an image."""
        self._drop(task.key)
        self._failed += [(row, error) for row in task.rows]
        self.remove([row.uid for row in task.rows])

    def _take_failed(self) -> tuple[tuple[Row, Exception], ...]:
        failed, self._failed = tuple(self._failed), []
        return failed

    def remove(self, uids: Collection[int]) -> None:
        """Remove rows, and the images that no other row contains."""
        for uid in uids:
            self._rows.pop(uid, None)
        for key, task in [*self._tasks.items()]:
            task.rows = [row for row in task.rows if row.uid not in uids]
            if not task.rows:
                self._drop(key)

    def clear(self) -> None:
        """Remove every row and drop all features."""
        self.remove([*self._rows])
        self._queued = []
        self._failed = []
        self._cache.clear()

    def erase_features(self, cutoffs: Mapping[str, float]) -> None:
        """Drop cached features of owners; see `FeatureCache.erase`."""
        self._cache.erase(cutoffs)

    def set_cache_limit(self, max_bytes: int) -> None:
        """Limit the bytes of cached features."""
        self._cache.set_limit(max_bytes)

    def warming(self) -> Iterator[None]:
        """Compile and measure the encoder; see `Encoder.warming`."""
        return self._encoder.warming()

    def stats(self) -> dict[str, float]:
        """Counters and gauges for `/metrics`."""
        return {
            "images_encoded_total": self._encoded,
            "image_cache_hits_total": self._cache.hits,
            "image_cache_bytes": self._cache.nbytes,
        }

    def close(self) -> None:
        """Stop the decoding thread."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _drop(self, key: Key) -> None:
        task = self._tasks.pop(key)
        if task.pixels is not None:
            task.pixels.cancel()
        self._look_ahead()

    def _look_ahead(self) -> None:
        """Request the decoding of the next images."""
        patches = 0
        for index, task in enumerate(self._tasks.values()):
            patches += task.image.layout.patches
            if index > 1 and patches > AHEAD_PATCHES:
                return
            if task.pixels is None:
                task.pixels = self._threads.submit(self._encoder.pixels, task.image)
