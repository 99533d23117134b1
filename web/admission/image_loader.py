"""Load the images of a request, and replace them in its messages by references.

An image is a data URL, an uploaded file or, if the service allows it, an http(s) URL. The job's record stores only the
digest and the size of each image; the files are stored separately until the job has ended.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Final, Generic, TypeVar

from shared.errors import Invalid, MlxqError, TooLarge
from shared.jobs.images import digest
from shared.settings import Settings
from web.admission.data_urls import decode_data_url, is_data_url
from web.admission.image_decoder import decoded_size
from web.http.threadpool import LARGE, run_in_threadpool
from web.schemas.inputs import InputsRequest
from web.schemas.messages import Message, Part, StoredImage
from web.schemas.requests import JobRequest

T = TypeVar("T")
R = TypeVar("R")

_MAX_CONCURRENT_DECODES: Final = 2
"""Decoding takes up to 17 bytes per pixel (an animated WebP), however small the file is."""


@dataclass(frozen=True, slots=True)
class LoadedRequest(Generic[R]):
    """A request whose messages refer to images by digest.

    Attributes:
        fingerprint_source: the request from which its fingerprint is computed. Here an image at an http(s) URL is
            identified by the URL, because its content may have changed when the request is repeated.
        files: the image files, by digest.
        skipped: number of images at URLs that were not read, because the request is repeated.
    """

    request: R
    fingerprint_source: R
    files: dict[str, bytes] = field(default_factory=dict)
    skipped: int = 0


@dataclass(frozen=True, slots=True)
class _Image:
    """The references to an image: in the job's messages, and in the source of the fingerprint."""

    stored: StoredImage
    fingerprinted: StoredImage


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
        request: JobRequest | InputsRequest,
        uploads: Sequence[bytes] = (),
        *,
        caller: str = "",
        is_repeated: Callable[[], bool] = lambda: False,
    ) -> LoadedRequest[Any]:
        """Load all images of a request, in the order in which the model gets them. Requests with inputs have none.

        Args:
            uploads: image files of the form; they come after `request.images`.
            caller: id of the API key.
            is_repeated: whether this request has created a job before. If so, images at http(s) URLs are not read
                again: they may have changed or disappeared, and the job has its own copies.

        Raises:
            Invalid: an image is broken, too large, of another format or unreachable; the field names it.
            TooLarge: an image, or all together, have too many bytes.
        """
        if isinstance(request, InputsRequest):
            return LoadedRequest(request, request)
        parts = request.image_parts
        if not (parts or request.images or uploads):
            return LoadedRequest(request, request)
        self._check_request(request, uploads)
        urls = [*(part.source for _, part in parts), *request.images]
        remote = sum(map(self.is_fetchable, urls))
        loading = _Loading(self, caller, skip_remote=bool(remote) and is_repeated())
        in_parts = {id(part): loading.from_url(name, part.source) for name, part in parts}
        others = [loading.from_url(f"images[{i}]", url) for i, url in enumerate(request.images)]
        others += [loading.from_upload(f"images[{i}]", data) for i, data in enumerate(uploads, len(others))]
        return LoadedRequest(
            request=_with_images(request, in_parts, others, attrgetter("stored")),
            fingerprint_source=_with_images(request, in_parts, others, attrgetter("fingerprinted")),
            files=loading.files,
            skipped=remote if loading.skip_remote else 0,
        )

    def _check_request(self, request: JobRequest, uploads: Sequence[bytes]) -> None:
        parts = request.image_parts
        count = len(parts) + len(request.images) + len(uploads)
        if count > self._max_images:
            name = parts[self._max_images][0] if len(parts) > self._max_images else "images"
            detail = f"The request has {count} images; at most {self._max_images} are allowed."
            raise Invalid(detail, code="too_many_images", field=name)
        if request.raw:
            raise Invalid("raw cannot be used with images. Leave out raw or the images.", field="raw")
        if request.prompt_tokens is not None:
            raise Invalid("prompt_tokens cannot be used with images. Use messages.", field="prompt_tokens")

    def is_fetchable(self, url: str) -> bool:
        """Whether a URL is an http(s) URL and the service reads them."""
        return self._fetch is not None and _is_http(url)

    def read(self, url: str, caller: str) -> bytes:
        """Return the image file at a data URL or, if the service allows it, an http(s) URL."""
        if is_data_url(url):
            return self.check_bytes(run_in_threadpool(len(url), lambda: decode_data_url(url)))
        if not _is_http(url):
            raise Invalid("An image must be a data URL (data:image/png;base64,…).", code="image_url_refused")
        if self._fetch is None:
            detail = "This service does not read images from URLs. Send a data URL or upload the file."
            raise Invalid(detail, code="image_url_refused")
        return self.check_bytes(self._fetch(url, self._max_bytes, caller))

    def check_bytes(self, data: bytes) -> bytes:
        """Return an image file, unless it is empty or too large."""
        if len(data) > self._max_bytes:
            detail = f"The image has {len(data):,} bytes; at most {self._max_bytes:,} are allowed."
            raise TooLarge(detail, code="image_too_large")
        if not data:
            raise Invalid("The image is empty.", code="image_broken")
        return data

    def check_total(self, total_bytes: int) -> None:
        """Check the size of all images: those read from URLs are not part of the body, which has the same limit."""
        if total_bytes > self._max_total_bytes:
            detail = f"The images together have more than {self._max_total_bytes:,} bytes."
            raise TooLarge(detail, code="image_too_large")

    def size(self, data: bytes) -> tuple[int, int]:
        """Decode an image file; return its width and height in pixels."""
        # Waiting here is bounded: each holder decodes one image of at most `max_image_pixels`.
        with self._decoding:
            # LARGE: always in a thread, because a small file may take long to decode.
            return run_in_threadpool(LARGE, lambda: decoded_size(data, self._max_pixels))


class _Loading:
    """Loads the images of one request.

    Attributes:
        files: the distinct image files, by digest.
    """

    def __init__(self, loader: ImageLoader, caller: str, *, skip_remote: bool) -> None:
        self._loader = loader
        self._caller = caller
        self.skip_remote = skip_remote
        self.files: dict[str, bytes] = {}
        self._sizes: dict[str, tuple[int, int]] = {}

    def from_url(self, name: str, url: str) -> _Image:
        by_url = StoredImage(image=url, width=0, height=0) if self._loader.is_fetchable(url) else None
        if by_url and self.skip_remote:
            return _Image(by_url, by_url)
        stored = self._add(name, lambda: self._loader.read(url, self._caller))
        return _Image(stored, by_url or stored)

    def from_upload(self, name: str, data: bytes) -> _Image:
        stored = self._add(name, lambda: self._loader.check_bytes(data))
        return _Image(stored, stored)

    def _add(self, name: str, read: Callable[[], bytes]) -> StoredImage:
        """Read and check an image, unless the same file was added before; return the reference to it."""
        data = _named(name, read)
        key = run_in_threadpool(len(data), lambda: digest(data))
        if key not in self.files:
            self.files[key] = data
            _named(name, lambda: self._loader.check_total(sum(map(len, self.files.values()))))
            self._sizes[key] = _named(name, lambda: self._loader.size(data))
        width, height = self._sizes[key]
        return StoredImage(image=key, width=width, height=height)


def _named(name: str, work: Callable[[], T]) -> T:
    """Call `work`; name the image in errors that it raises."""
    try:
        return work()
    except MlxqError as error:
        raise type(error)(f"{name}: {error.detail}", code=error.code, field=name) from error.__cause__


def _is_http(url: str) -> bool:
    return url.split(":", 1)[0].lower() in ("http", "https")


def _with_images(
    request: JobRequest, in_parts: dict[int, _Image], others: list[_Image], reference: Callable[[_Image], StoredImage]
) -> JobRequest:
    """Replace the images of a request by references.

    Args:
        in_parts: images in parts of messages, by the `id` of the part.
        others: the remaining images; they go to the beginning of the last user message.
        reference: selects which reference to an image to use.
    """
    messages = request.messages
    if messages is None:
        messages = [Message(role="user", content=request.prompt or "")]
    references = {part: reference(image) for part, image in in_parts.items()}
    first = [reference(image) for image in others]
    last = max((i for i, message in enumerate(messages) if message.role == "user"), default=len(messages) - 1)
    replaced = [_with_references(message, references, first if i == last else []) for i, message in enumerate(messages)]
    return request.model_copy(update={"messages": replaced, "images": []})


def _with_references(message: Message, references: dict[int, StoredImage], first: list[StoredImage]) -> Message:
    if isinstance(message.content, list):
        parts = message.content
    elif first:
        parts = [Part(type="text", text=message.content or "")]
    else:
        return message
    content: list[Any] = [*first, *(references.get(id(part), part) for part in parts)]
    return message.model_copy(update={"content": content})
