"""The images of a request: read, checked, and replaced by what the job's record says of them.

An image comes as a data URL, as an uploaded file or, where that is switched on, as an http(s) URL. It is decoded here
once, so that a broken one is refused with its name instead of failing a job later; the worker decodes it again.
"""

from __future__ import annotations

import base64
import binascii
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from typing import Any, Final, TypeVar

from PIL import Image, UnidentifiedImageError

from shared.errors import Invalid, MlxqError, TooLarge
from shared.jobs.images import digest
from shared.models.image_geometry import MOST_ASPECT
from shared.settings import Settings
from web.http.threadpool import LARGE, run_in_threadpool
from web.schemas.requests import InferenceRequest, JobRequest, Message, Part, StoredImage

T = TypeVar("T")

Image.MAX_IMAGE_PIXELS = None  # the limit is ours, and known before anything is unpacked

_DECODED_AT_ONCE: Final = 2
"""Images: one takes up to seventeen bytes a pixel (an animated WebP) while it is decoded, however small its file is."""
FORMATS: Final = ("PNG", "JPEG", "WEBP", "GIF")
_DATA_URL: Final = re.compile(r"data:[\w.+/-]*(?:;[\w=.+-]+)*?(;base64)?,", re.IGNORECASE)
_LONGEST_HEAD: Final = 256
"""Characters of a data URL before its data. To look for the comma in all of one that has none would take seconds."""
_ORIENTATION, _LYING = 0x0112, (5, 6, 7, 8)
"""Of a camera's pictures: the tag, and the values with which width and height change places."""
_PNG: Final = b"\x89PNG\r\n\x1a\n"
_JPEG: Final = b"\xff\xd8\xff"
_MARKER: Final = re.compile(rb"\xff([\xc0-\xc7\xc9-\xcf\xd9-\xef\xfe])")
"""What begins a segment with a length, or ends a JPEG; decoders pass over all others, or end at them."""
_SCAN, _END = b"\xda", b"\xd9"
_MOST_SCANS, _MOST_SEGMENTS = 50, 1000
"""Of a JPEG; programs write a dozen, and some hundred where they keep a profile or a second picture."""


@dataclass(frozen=True, slots=True)
class LoadedRequest:
    """A request whose images are in `files` (by digest) instead of in its messages.

    Attributes:
        meant: what tells it from another request: images at http(s) URLs are those URLs, whatever is there today.
        unread: images that were left where they are.
    """

    request: JobRequest
    meant: JobRequest
    files: dict[str, bytes] = field(default_factory=dict)
    unread: int = 0


@dataclass(frozen=True, slots=True)
class _Image:
    """What stands for an image in the record; and in what tells requests apart, if that is something else."""

    stored: StoredImage
    told: StoredImage | None = None

    @property
    def meant(self) -> StoredImage:
        return self.told or self.stored


class ImageLoader:
    """Takes images out of requests.

    Args:
        fetch: reads an http(s) URL, at most so many bytes, for a caller; None: such URLs are refused.
    """

    def __init__(self, settings: Settings, fetch: Callable[[str, int, str], bytes] | None) -> None:
        self._most = settings.max_images
        self._most_bytes = settings.max_image_bytes
        self._most_bytes_in_all = settings.max_body_bytes
        self._most_pixels = settings.max_image_pixels
        self._fetch = fetch
        self._decoding = threading.BoundedSemaphore(_DECODED_AT_ONCE)

    def load(
        self,
        request: JobRequest,
        uploads: Sequence[bytes] = (),
        *,
        caller: str = "",
        repeated: Callable[[], bool] = lambda: False,
    ) -> LoadedRequest:
        """Read all images of a request, in the order in which the model sees them.

        Args:
            caller: the API key's id.
            repeated: whether there is a job of this request already. Then images at http(s) URLs are not read again:
                they may be gone, or others, and the job has those that it began with.

        Raises:
            Invalid: one is broken, too large, of another kind or cannot be had; the field names it.
            TooLarge: one has too many bytes.
        """
        parts = request.image_parts
        if not (parts or request.images or uploads):
            return LoadedRequest(request, request)
        count = len(parts) + len(request.images) + len(uploads)
        if count > self._most:
            where = parts[self._most][0] if len(parts) > self._most else "images"
            raise Invalid(
                f"A request has {self._most} images at most, not {count}.", code="too_many_images", field=where
            )
        if isinstance(request, InferenceRequest) and request.raw:
            raise Invalid("A raw prompt says nowhere where its images are: leave raw out.", field="raw")
        files: dict[str, bytes] = {}
        sizes: dict[str, tuple[int, int]] = {}

        def stored(where: str, read: Callable[[], bytes]) -> StoredImage:
            data = self._named(where, read)
            name = run_in_threadpool(len(data), lambda: digest(data))
            if name not in files:
                files[name] = data
                self._named(where, lambda: self._bound_in_all(files))
                sizes[name] = self._named(where, lambda: self._size(data))
            return StoredImage(image=name, width=sizes[name][0], height=sizes[name][1])

        urls = [part.source for _, part in parts] + request.images
        remote = [url for url in urls if _is_remote(url)] if self._fetch else []
        leave = bool(remote) and repeated()

        def one(where: str, url: str) -> _Image:
            told = StoredImage(image=url, width=0, height=0) if self._fetch and _is_remote(url) else None
            return _Image(told if told and leave else stored(where, partial(self._read, url, caller)), told)

        found = {id(part): one(where, part.source) for where, part in parts}
        loose = [one(f"images[{i}]", url) for i, url in enumerate(request.images)]
        for i, upload in enumerate(uploads, len(loose)):
            loose.append(_Image(stored(f"images[{i}]", partial(self._bounded, upload))))
        return LoadedRequest(
            _with(request, {part: image.stored for part, image in found.items()}, [image.stored for image in loose]),
            _with(request, {part: image.meant for part, image in found.items()}, [image.meant for image in loose]),
            files,
            len(remote) if leave else 0,
        )

    def _named(self, where: str, work: Callable[[], T]) -> T:
        """Do something with an image; what it raises names the image."""
        try:
            return work()
        except MlxqError as error:
            raise type(error)(f"{where}: {error.detail}", code=error.code, field=where) from error.__cause__

    def _read(self, url: str, caller: str) -> bytes:
        if url[:5].lower() == "data:":
            return self._bounded(run_in_threadpool(len(url), lambda: _decoded(url)))
        if not _is_remote(url):
            raise Invalid("An image is a data URL (data:image/png;base64,…).", code="image_url_refused")
        if self._fetch is None:
            detail = "This service reads no images from other places: send a data URL or a file."
            raise Invalid(detail, code="image_url_refused")
        return self._bounded(self._fetch(url, self._most_bytes, caller))

    def _bounded(self, data: bytes) -> bytes:
        if len(data) > self._most_bytes:
            detail = f"The image has {len(data):,} bytes; {self._most_bytes:,} are allowed."
            raise TooLarge(detail, code="image_too_large")
        if not data:
            raise Invalid("The image is empty.", code="image_broken")
        return data

    def _bound_in_all(self, files: dict[str, bytes]) -> None:
        """What is read from URLs comes on top of the body, and must not be more than a body may hold."""
        if sum(map(len, files.values())) > self._most_bytes_in_all:
            detail = f"The images have more than the {self._most_bytes_in_all:,} bytes that are allowed in all."
            raise TooLarge(detail, code="image_too_large")

    def _size(self, data: bytes) -> tuple[int, int]:
        """Width and height of the upright image; all of its first frame is decoded."""
        # The wait ends: each holder decodes one image of at most `max_image_pixels`, in a thread.
        with self._decoding:
            # However few bytes it has, unpacked it may be large.
            return run_in_threadpool(LARGE, lambda: self._decoded_size(data))

    def _decoded_size(self, data: bytes) -> tuple[int, int]:
        if data.startswith(_JPEG) and _piled_up(data):
            raise Invalid("The image is broken: it has more segments than a JPEG has.", code="image_broken")
        try:
            with Image.open(BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
                if width * height > self._most_pixels:  # before anything is unpacked
                    detail = f"The image has {width} x {height} pixels; {self._most_pixels:,} are allowed."
                    raise Invalid(detail, code="image_too_many_pixels")
                if max(width, height) > MOST_ASPECT * min(width, height):
                    detail = f"The image has {width} x {height} pixels: one side is over {MOST_ASPECT} times the other."
                    raise Invalid(detail, code="image_shape")
                image.load()
                if data.startswith(_PNG):  # decoding does not compare all checksums
                    with Image.open(BytesIO(data), formats=("PNG",)) as whole:
                        whole.verify()
                turned = image.getexif().get(_ORIENTATION) in _LYING
        except UnidentifiedImageError as error:
            raise Invalid(f"The image is none of {', '.join(FORMATS)}.", code="image_format") from error
        except MlxqError:
            raise
        except Exception as error:  # decoders raise anything on what is no image
            raise Invalid("The image is broken: it cannot be decoded.", code="image_broken") from error
        return (height, width) if turned else (width, height)


def _is_remote(url: str) -> bool:
    return url.split(":", 1)[0].lower() in ("http", "https")


def _piled_up(jpeg: bytes) -> bool:
    """Whether it has more scans or segments than a picture needs.

    Each scan goes over all of the picture, and each segment over those before it, however few bytes they have: a small
    file could be decoded for an hour.
    """
    at = scans = 0
    for _ in range(_MOST_SEGMENTS):
        found = _MARKER.search(jpeg, at)
        if found is None or (found[1] == _END and scans):
            return False
        scans += found[1] == _SCAN
        if scans > _MOST_SCANS:
            return True
        at = found.end()
        at += 0 if found[1] == _END else int.from_bytes(jpeg[at : at + 2])
    return True


def _decoded(url: str) -> bytes:
    head = _DATA_URL.match(url, 0, _LONGEST_HEAD)
    if head is None or not head[1]:
        raise Invalid("The data URL is not in base64 (data:image/png;base64,…).", code="image_broken")
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise Invalid("The data URL's base64 is broken.", code="image_broken") from error


def _with(request: JobRequest, found: dict[int, StoredImage], loose: list[StoredImage]) -> JobRequest:
    """The request with these in the place of its images, and `loose` ones before the last thing the user says."""
    turns = request.messages if request.messages is not None else [Message(role="user", content=request.prompt or "")]
    last = max((i for i, turn in enumerate(turns) if turn.role == "user"), default=len(turns) - 1)
    told = []
    for number, turn in enumerate(turns):
        parts = [Part(type="text", text=turn.content)] if isinstance(turn.content, str) else turn.content
        shown: list[Any] = [*(loose if number == last else []), *(found.get(id(part), part) for part in parts)]
        plain = isinstance(turn.content, str) and not (loose and number == last)
        told.append(turn if plain else Message.model_construct(role=turn.role, content=shown))
    return request.model_copy(update={"messages": told, "images": []})
