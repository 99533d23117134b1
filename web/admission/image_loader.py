"""Load the images of a request, and replace them in its messages by references.

An image is a data URL, an uploaded file or, if the service allows it, an http(s) URL. The job's record stores only the
digest and the size of each image; the files are stored separately until the job has ended.
"""

from __future__ import annotations

import base64
import binascii
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, TypeVar

from shared.errors import Invalid, MlxqError, TooLarge
from shared.jobs.images import digest
from shared.settings import Settings
from web.admission.image_decoder import decoded_size
from web.http.threadpool import LARGE, run_in_threadpool
from web.schemas.requests import InferenceRequest, JobRequest, Message, Part, StoredImage

T = TypeVar("T")

_MAX_CONCURRENT_DECODES: Final = 2
"""Decoding takes up to 17 bytes per pixel (an animated WebP), however small the file is."""
_DATA_URL: Final = re.compile(r"data:[\w.+/-]*(?:;[\w=.+-]+)*?(;base64)?,", re.IGNORECASE)
_MAX_DATA_URL_HEAD: Final = 256
"""Maximum characters before the comma of a data URL. Searching a whole URL that has no comma would take seconds."""


@dataclass(frozen=True, slots=True)
class LoadedRequest:
    """A request whose messages refer to images by digest.

    Attributes:
        fingerprint_source: the request from which its fingerprint is computed. Here an image at an http(s) URL is
            identified by the URL, because its content may have changed when the request is repeated.
        files: the image files, by digest.
        skipped: number of images at URLs that were not read, because the request is repeated.
    """

    request: JobRequest
    fingerprint_source: JobRequest
    files: dict[str, bytes] = field(default_factory=dict)
    skipped: int = 0


@dataclass(frozen=True, slots=True)
class _Image:
    """The references to an image: in the job's messages, and in the source of the fingerprint."""

    stored: StoredImage
    fingerprinted: StoredImage


@dataclass(slots=True)
class _Files:
    """The distinct image files of one request, and their sizes in pixels, by digest."""

    data: dict[str, bytes] = field(default_factory=dict)
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        return sum(map(len, self.data.values()))


class ImageLoader:
    """Loads images according to the service's limits.

    Args:
        fetch: reads an http(s) URL, given the maximum size in bytes and the API key's id; None: refuse such URLs.
    """

    def __init__(self, settings: Settings, fetch: Callable[[str, int, str], bytes] | None) -> None:
        self._max_images = settings.max_images
        self._max_bytes = settings.max_image_bytes
        self._max_total_bytes = settings.max_body_bytes
        self._max_pixels = settings.max_image_pixels
        self._fetch = fetch
        self._decoding = threading.BoundedSemaphore(_MAX_CONCURRENT_DECODES)

    def load(
        self,
        request: JobRequest,
        uploads: Sequence[bytes] = (),
        *,
        caller: str = "",
        is_repeated: Callable[[], bool] = lambda: False,
    ) -> LoadedRequest:
        """Load all images of a request, in the order in which the model gets them.

        Args:
            uploads: image files of the form; they come after `request.images`.
            caller: id of the API key.
            is_repeated: whether this request has created a job before. If so, images at http(s) URLs are not read
                again: they may have changed or disappeared, and the job has its own copies.

        Raises:
            Invalid: an image is broken, too large, of another format or unreachable; the field names it.
            TooLarge: an image, or all together, have too many bytes.
        """
        parts = request.image_parts
        if not (parts or request.images or uploads):
            return LoadedRequest(request, request)
        self._check_request(request, uploads)
        urls = [*(part.source for _, part in parts), *request.images]
        remote = sum(map(self._is_fetchable, urls))
        skip_remote = bool(remote) and is_repeated()
        files = _Files()

        def load_url(name: str, url: str) -> _Image:
            by_url = StoredImage(image=url, width=0, height=0) if self._is_fetchable(url) else None
            if by_url and skip_remote:
                return _Image(by_url, by_url)
            stored = self._add(files, name, partial(self._read, url, caller))
            return _Image(stored, by_url or stored)

        in_parts = {id(part): load_url(name, part.source) for name, part in parts}
        others = [load_url(f"images[{i}]", url) for i, url in enumerate(request.images)]
        for i, upload in enumerate(uploads, len(others)):
            stored = self._add(files, f"images[{i}]", partial(self._check_bytes, upload))
            others.append(_Image(stored, stored))
        return LoadedRequest(
            request=_with_images(
                request, {part: image.stored for part, image in in_parts.items()}, [image.stored for image in others]
            ),
            fingerprint_source=_with_images(
                request,
                {part: image.fingerprinted for part, image in in_parts.items()},
                [image.fingerprinted for image in others],
            ),
            files=files.data,
            skipped=remote if skip_remote else 0,
        )

    def _check_request(self, request: JobRequest, uploads: Sequence[bytes]) -> None:
        parts = request.image_parts
        count = len(parts) + len(request.images) + len(uploads)
        if count > self._max_images:
            name = parts[self._max_images][0] if len(parts) > self._max_images else "images"
            detail = f"The request has {count} images; at most {self._max_images} are allowed."
            raise Invalid(detail, code="too_many_images", field=name)
        if isinstance(request, InferenceRequest) and request.raw:
            raise Invalid("raw cannot be used with images. Leave out raw or the images.", field="raw")

    def _is_fetchable(self, url: str) -> bool:
        return self._fetch is not None and _is_http(url)

    def _add(self, files: _Files, name: str, read: Callable[[], bytes]) -> StoredImage:
        """Read and check an image, unless the same file was added before; return the reference to it."""
        data = _named(name, read)
        key = run_in_threadpool(len(data), lambda: digest(data))
        if key not in files.data:
            files.data[key] = data
            _named(name, lambda: self._check_total(files))
            files.sizes[key] = _named(name, lambda: self._decoded_size(data))
        width, height = files.sizes[key]
        return StoredImage(image=key, width=width, height=height)

    def _read(self, url: str, caller: str) -> bytes:
        if url[:5].lower() == "data:":
            return self._check_bytes(run_in_threadpool(len(url), lambda: _decode_data_url(url)))
        if not _is_http(url):
            raise Invalid("An image must be a data URL (data:image/png;base64,…).", code="image_url_refused")
        if self._fetch is None:
            detail = "This service does not read images from URLs. Send a data URL or upload the file."
            raise Invalid(detail, code="image_url_refused")
        return self._check_bytes(self._fetch(url, self._max_bytes, caller))

    def _check_bytes(self, data: bytes) -> bytes:
        if len(data) > self._max_bytes:
            detail = f"The image has {len(data):,} bytes; at most {self._max_bytes:,} are allowed."
            raise TooLarge(detail, code="image_too_large")
        if not data:
            raise Invalid("The image is empty.", code="image_broken")
        return data

    def _check_total(self, files: _Files) -> None:
        """Images read from URLs are not part of the body, so its size limit is applied to all images here."""
        if files.total_bytes > self._max_total_bytes:
            detail = f"The images together have more than {self._max_total_bytes:,} bytes."
            raise TooLarge(detail, code="image_too_large")

    def _decoded_size(self, data: bytes) -> tuple[int, int]:
        # Waiting here is bounded: each holder decodes one image of at most `max_image_pixels`.
        with self._decoding:
            # LARGE: always in a thread, because a small file may take long to decode.
            return run_in_threadpool(LARGE, lambda: decoded_size(data, self._max_pixels))


def _named(name: str, work: Callable[[], T]) -> T:
    """Call `work`; name the image in errors that it raises."""
    try:
        return work()
    except MlxqError as error:
        raise type(error)(f"{name}: {error.detail}", code=error.code, field=name) from error.__cause__


def _is_http(url: str) -> bool:
    return url.split(":", 1)[0].lower() in ("http", "https")


def _decode_data_url(url: str) -> bytes:
    head = _DATA_URL.match(url, 0, _MAX_DATA_URL_HEAD)
    if head is None or not head[1]:
        raise Invalid("The data URL must have the form data:image/png;base64,….", code="image_broken")
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise Invalid("The data URL does not contain valid base64.", code="image_broken") from error


def _with_images(request: JobRequest, in_parts: dict[int, StoredImage], others: list[StoredImage]) -> JobRequest:
    """Replace the images of a request by references.

    Args:
        in_parts: references for image parts of messages, by the `id` of the part.
        others: references for the remaining images; they go to the beginning of the last user message.
    """
    messages = request.messages
    if messages is None:
        messages = [Message(role="user", content=request.prompt or "")]
    last = max((i for i, message in enumerate(messages) if message.role == "user"), default=len(messages) - 1)
    replaced = [_with_references(message, in_parts, others if i == last else []) for i, message in enumerate(messages)]
    return request.model_copy(update={"messages": replaced, "images": []})


def _with_references(message: Message, in_parts: dict[int, StoredImage], first: list[StoredImage]) -> Message:
    if isinstance(message.content, str):
        if not first:
            return message
        parts = [Part(type="text", text=message.content)]
    else:
        parts = message.content
    content: list[Any] = [*first, *(in_parts.get(id(part), part) for part in parts)]
    return Message.model_construct(role=message.role, content=content)
