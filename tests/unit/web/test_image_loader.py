"""Loading the images of requests: accepted forms, limits and error messages."""

from __future__ import annotations

import io
import re
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from shared.errors import Invalid, MlxqError, TooLarge
from shared.jobs.images import digest
from shared.models.image_geometry import ImageGeometry
from shared.settings import Settings
from tests.support.image_files import data_url, picture
from web.admission import data_urls
from web.admission import image_loader as image_loader_module
from web.admission.image_loader import ImageLoader
from web.schemas.requests import InferenceRequest, JobRequest

PNG = picture()
URL = data_url(PNG)
STORED = {"type": "image", "image": digest(PNG), "width": 300, "height": 200}
TEXT = {"type": "text", "text": "What?"}


@pytest.fixture
def image_loader(settings: Settings) -> ImageLoader:
    return ImageLoader(settings, None)


def settings_with(**more: Any) -> Settings:
    return Settings(data_dir=Path("data"), **more)


def job_request(**body: Any) -> JobRequest:
    return JobRequest.model_validate(body)


def message_request(content: Any) -> JobRequest:
    return job_request(messages=[{"role": "user", "content": content}])


def refusal(image_loader: ImageLoader, request: JobRequest, *uploads: bytes) -> MlxqError:
    with pytest.raises(MlxqError) as caught:
        image_loader.load(request, uploads)
    return caught.value


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": URL}},
        {"type": "image_url", "image_url": {"url": URL, "detail": "high"}},
        {"type": "image_url", "image_url": URL},
        {"type": "image", "image": URL},
    ],
)
def test_an_image_part_is_replaced_by_a_reference(image_loader: ImageLoader, part: dict[str, Any]) -> None:
    loaded = image_loader.load(message_request([part, TEXT]))
    assert loaded.files == {digest(PNG): PNG}
    assert loaded.request.chat_messages() == ({"role": "user", "content": [STORED, TEXT]},)
    assert URL not in loaded.request.canonical_json()


@pytest.mark.parametrize("body", [{"prompt": "What?"}, {"messages": [{"role": "user", "content": "What?"}]}])
def test_images_and_uploads_come_before_the_text_of_the_user(image_loader: ImageLoader, body: dict[str, Any]) -> None:
    for kind in (JobRequest, InferenceRequest):
        loaded = image_loader.load(kind.model_validate({**body, "images": [URL]}), [picture(seed=2)])
        (turn,) = loaded.request.chat_messages() or ()
        assert [part["type"] for part in turn["content"]] == ["image", "image", "text"]
        assert turn["content"][0] == STORED
        assert turn["content"][2] == TEXT
        assert list(loaded.files) == [digest(PNG), digest(picture(seed=2))]


def test_images_go_to_the_last_user_message(image_loader: ImageLoader) -> None:
    turns = [("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c")]
    request = job_request(messages=[{"role": role, "content": text} for role, text in turns], images=[URL])
    messages = image_loader.load(request).request.chat_messages() or ()
    assert [turn["content"] for turn in messages[:3]] == ["Be brief.", "a", "b"]
    assert messages[3]["content"] == [STORED, {"type": "text", "text": "c"}]


def test_a_raw_prompt_with_images_is_refused(image_loader: ImageLoader) -> None:
    for body, uploads in (({"images": [URL]}, []), ({}, [PNG])):
        with pytest.raises(Invalid) as caught:
            image_loader.load(InferenceRequest.model_validate({"prompt": "?", "raw": True, **body}), uploads)
        assert caught.value.field == "raw"


def test_an_image_that_occurs_twice_is_stored_once(image_loader: ImageLoader) -> None:
    loaded = image_loader.load(
        message_request([{"type": "image", "image": URL}, {"type": "image", "image": URL}, TEXT])
    )
    assert len(loaded.files) == 1
    assert [part["type"] for part in (loaded.request.chat_messages() or ())[0]["content"]] == [
        "image", "image", "text",
    ]  # fmt: skip


def test_the_form_of_an_image_does_not_change_the_fingerprint(image_loader: ImageLoader) -> None:
    forms = [{"type": "image", "image": URL}, {"type": "image_url", "image_url": {"url": data_url(PNG, "image/jpeg")}}]
    assert len({image_loader.load(message_request([form, TEXT])).request.canonical_json() for form in forms}) == 1
    other = {"type": "image", "image": data_url(picture(seed=9))}
    assert (
        image_loader.load(message_request([other, TEXT])).request.canonical_json()
        != image_loader.load(message_request([forms[0], TEXT])).request.canonical_json()
    )


def test_text_parts_are_joined(image_loader: ImageLoader) -> None:
    request = image_loader.load(message_request([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])).request
    assert request.chat_messages() == ({"role": "user", "content": "a\nb"},)


@pytest.mark.parametrize(
    ("form", "mode", "save"),
    [
        ("PNG", "RGB", {}), ("PNG", "RGBA", {}), ("PNG", "P", {}), ("PNG", "L", {}), ("PNG", "1", {}),
        ("JPEG", "RGB", {}),
        ("JPEG", "CMYK", {}), ("WEBP", "RGBA", {}), ("GIF", "P", {}),
        ("GIF", "P", {"save_all": True, "append_images": [Image.new("P", (300, 200), 3)]}),
    ],
)  # fmt: skip
def test_image_formats_and_modes(image_loader: ImageLoader, form: str, mode: str, save: dict[str, Any]) -> None:
    loaded = image_loader.load(
        message_request([{"type": "image", "image": data_url(picture(form=form, mode=mode, **save))}, TEXT])
    )
    (turn,) = loaded.request.chat_messages() or ()
    assert (turn["content"][0]["width"], turn["content"][0]["height"]) == (300, 200)


def test_the_size_takes_the_exif_orientation_into_account(image_loader: ImageLoader) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    loaded = image_loader.load(job_request(prompt="?", images=[data_url(picture(form="JPEG", exif=exif.tobytes()))]))
    (turn,) = loaded.request.chat_messages() or ()
    assert (turn["content"][0]["width"], turn["content"][0]["height"]) == (200, 300)


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header states this size, without any pixel data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def jpeg_of(scans: int, width: int = 64, height: int = 48) -> bytes:
    """A progressive JPEG with this many scans: the last one is repeated."""
    file = picture(width, height, form="JPEG", progressive=True)
    last = file.rindex(b"\xff\xda")
    tables = file.rindex(b"\xff\xc4", 0, last)
    return file[:-2] + file[tables:-2] * (scans - file.count(b"\xff\xda")) + file[-2:]


def with_segments(segment: bytes, count: int) -> bytes:
    """A JPEG with this segment repeated at its beginning."""
    file = picture(form="JPEG")
    return file[:2] + segment * count + file[2:]


def bitmap() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (10, 10)).save(file, "BMP")
    return file.getvalue()


@pytest.mark.parametrize(
    ("url", "code"),
    [
        (data_url(PNG[:200]), "image_broken"),
        (data_url(picture(form="JPEG")[:300]), "image_broken"),
        (data_url(b""), "image_broken"),
        (data_url(b"no image at all"), "image_format"),
        (data_url(bitmap()), "image_format"),
        (data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"), "image_format"),
        (data_url(bomb(50_000, 50_000)), "image_too_many_pixels"),
        (data_url(bomb(10_000, 10_000)), "image_too_many_pixels"),
        (data_url(picture(201, 1)), "image_shape"),
        (data_url(picture(20, 4001)), "image_shape"),
        ("data:image/png;base64,%%%", "image_broken"),
        ("data:image/png,abc", "image_format"),
        ("data:", "image_broken"),
        ("file:///etc/passwd", "image_url_refused"),
        ("/etc/passwd", "image_url_refused"),
        ("http://example.com/a.png", "image_url_refused"),
    ],
)
def test_an_invalid_image_is_refused_and_named(image_loader: ImageLoader, url: str, code: str) -> None:
    for request, field in (
        (job_request(prompt="?", images=[URL, url]), "images[1]"),
        (message_request([TEXT, {"type": "image_url", "image_url": {"url": url}}]), "messages[0].content[1]"),
    ):
        error = refusal(image_loader, request)
        assert (type(error), error.code, error.field) == (Invalid, code, field)
        assert error.detail.startswith(f"{field}: ")
        assert url[22:] not in error.detail or len(url) < 30


PROFILE = b"\xff\xe2" + (2 + 4000).to_bytes(2) + b"\xff\xda" * 2000
EXIF = b"\xff\xe1\0\x6cExif\0\0" + bytes(100)


@pytest.mark.parametrize(
    "image",
    [jpeg_of(51), jpeg_of(5000), with_segments(EXIF, 1001), with_segments(b"\xff\xd9\xff\xf0\xff\xff" + EXIF, 1001)],
)
def test_a_jpeg_with_too_many_scans_or_segments_is_not_decoded(
    image_loader: ImageLoader, image: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "open", None)
    error = refusal(image_loader, job_request(prompt="?", images=[data_url(image)]))
    assert (type(error), error.code, error.field) == (Invalid, "image_broken", "images[0]")
    assert "scans or segments" in error.detail


@pytest.mark.parametrize(
    "image",
    [
        jpeg_of(50), with_segments(EXIF, 200), with_segments(PROFILE, 255), picture(form="JPEG") + PROFILE * 100,
        picture(form="JPEG", restart_marker_blocks=1), picture(2000, 1500, form="JPEG", quality=100),
    ],
)  # fmt: skip
def test_a_jpeg_with_many_metadata_segments_is_accepted(image_loader: ImageLoader, image: bytes) -> None:
    assert len(image_loader.load(job_request(prompt="?", images=[data_url(image)])).files) == 1


@pytest.mark.parametrize("url", ["data:" + "A" * 10**7, "data:image/png" + ";a" * 5 * 10**6])
def test_a_long_data_url_without_data_is_refused_without_searching_it(
    image_loader: ImageLoader, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[int] = []
    pattern = data_urls._HEAD

    class Pattern:
        def match(self, text: str, start: int, end: int) -> re.Match[str] | None:
            searched.append(end - start)
            return pattern.match(text, start, end)

    monkeypatch.setattr(data_urls, "_HEAD", Pattern())
    assert refusal(image_loader, job_request(prompt="?", images=[url])).code == "image_broken"
    assert max(searched) < 10_000


@pytest.mark.parametrize("size", [(200, 1), (20, 4000), (1, 1)])
def test_extreme_sizes_that_models_support_are_accepted(image_loader: ImageLoader, size: tuple[int, int]) -> None:
    assert image_loader.load(job_request(prompt="?", images=[data_url(picture(*size))])).files
    assert ImageGeometry(28, 3136, 12845056).resized(*size)


def test_an_invalid_upload_is_named_by_its_index_after_the_other_images(image_loader: ImageLoader) -> None:
    assert refusal(image_loader, job_request(prompt="?", images=[URL]), PNG, b"no").field == "images[2]"


def test_each_limit_is_enforced(settings: Settings) -> None:
    few = ImageLoader(settings.model_copy(update={"max_images": 2}), None)
    assert refusal(few, job_request(prompt="?", images=[URL] * 3)).code == "too_many_images"
    error = refusal(few, message_request([{"type": "image", "image": URL}] * 3))
    assert (error.code, error.field) == ("too_many_images", "messages[0].content[2]")
    small = ImageLoader(settings.model_copy(update={"max_image_bytes": len(PNG) - 1}), None)
    error = refusal(small, job_request(prompt="?", images=[URL]))
    assert (type(error), error.code, error.field) == (TooLarge, "image_too_large", "images[0]")
    narrow = ImageLoader(settings.model_copy(update={"max_image_pixels": 300 * 200 - 1}), None)
    assert refusal(narrow, job_request(prompt="?", images=[URL])).code == "image_too_many_pixels"
    fitting = settings.model_copy(update={"max_image_bytes": len(PNG), "max_image_pixels": 60_000, "max_images": 1})
    assert ImageLoader(fitting, None).load(job_request(prompt="?", images=[URL])).files


@pytest.mark.parametrize(
    ("content", "location"),
    [
        ([], ("messages", 0, "content", "(parts)")),
        ([{"type": "image"}], ("messages", 0, "content", "(parts)", 0)),
        ([{"type": "text", "text": "a", "image": URL}], ("messages", 0, "content", "(parts)", 0)),
        ([{"type": "video", "video": URL}], ("messages", 0, "content", "(parts)", 0, "type")),
        (
            [{"type": "image_url", "image_url": {"uri": URL}}],
            ("messages", 0, "content", "(parts)", 0, "image_url", "url"),
        ),
        (7, ("messages", 0, "content", "(parts)")),
        ([{"type": "text", "text": ""}, {"type": "text", "text": ""}], ("messages",)),
    ],
)
def test_errors_name_the_invalid_part(content: Any, location: tuple[object, ...]) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 -- a ValidationError of pydantic
        message_request(content)
    assert caught.value.errors()[0]["loc"] == location  # type: ignore[attr-defined]


def test_an_image_at_a_url_is_fetched_within_the_size_limit(settings: Settings) -> None:
    fetched: list[tuple[str, int, str]] = []

    def fetch(url: str, max_bytes: int, caller: str) -> bytes:
        fetched.append((url, max_bytes, caller))
        return PNG

    loaded = ImageLoader(settings, fetch).load(
        job_request(prompt="?", images=["https://example.com/a.png"]), caller="me"
    )
    assert loaded.files == {digest(PNG): PNG}
    assert fetched == [("https://example.com/a.png", settings.max_image_bytes, "me")]


def test_a_repeated_request_is_recognised_by_its_urls_and_fetches_nothing(settings: Settings) -> None:
    pictures = iter([PNG, picture(seed=2)])
    image_loader = ImageLoader(settings, lambda *_: next(pictures))
    request = message_request(
        [{"type": "image", "image": "https://example.com/a.png"}, {"type": "image", "image": URL}, TEXT]
    )
    request = request.model_copy(update={"images": ["http://example.com/a.png"]})
    first = image_loader.load(request, is_repeated=lambda: False)
    again = image_loader.load(request, is_repeated=lambda: True)
    assert (
        first.fingerprint_source.canonical_json()
        == again.fingerprint_source.canonical_json()
        != first.request.canonical_json()
    )
    assert (len(first.files), first.skipped, len(again.files), again.skipped) == (2, 0, 1, 2)
    other = request.model_copy(update={"images": ["http://example.com/b.png"]})
    assert (
        image_loader.load(other, is_repeated=lambda: True).fingerprint_source.canonical_json()
        != first.fingerprint_source.canonical_json()
    )


def test_a_request_without_urls_is_not_checked_for_repetition(settings: Settings) -> None:
    def is_repeated() -> bool:
        raise AssertionError

    image_loader = ImageLoader(settings, lambda *_: PNG)
    loaded = image_loader.load(job_request(prompt="?", images=[URL]), [PNG], is_repeated=is_repeated)
    assert loaded.fingerprint_source.canonical_json() == loaded.request.canonical_json()


def test_images_from_urls_together_are_limited_to_the_size_of_a_body(settings: Settings) -> None:
    files = {f"https://example.com/{n}.png": picture(seed=n) for n in range(4)}
    total = sum(map(len, files.values()))
    fitting = ImageLoader(settings.model_copy(update={"max_body_bytes": total}), lambda url, *_: files[url])
    assert len(fitting.load(job_request(prompt="?", images=[*files, *files])).files) == 4, (
        "a repeated image counts once"
    )
    small = ImageLoader(settings.model_copy(update={"max_body_bytes": total - 1}), lambda url, *_: files[url])
    error = refusal(small, job_request(prompt="?", images=list(files)))
    assert (type(error), error.code, error.field) == (TooLarge, "image_too_large", "images[3]")


def test_at_most_two_images_are_decoded_at_once(image_loader: ImageLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, released = threading.Semaphore(0), threading.Event()

    def decode(data: bytes, max_pixels: int) -> tuple[int, int]:
        begun.release()
        assert released.wait(30)
        return 1, 1

    monkeypatch.setattr(image_loader_module, "decoded_size", decode)
    with ThreadPoolExecutor(4) as pool:
        loads = [
            pool.submit(image_loader.load, job_request(prompt="?", images=[data_url(picture(seed=n))]))
            for n in range(4)
        ]
        try:
            assert begun.acquire(timeout=10) and begun.acquire(timeout=10)
            assert not begun.acquire(timeout=0.2), "a third image waits"
        finally:
            released.set()
        assert all(each.result(10).files for each in loads)


def test_a_png_with_a_wrong_checksum_is_refused(image_loader: ImageLoader) -> None:
    damaged = bytearray(PNG)
    damaged[PNG.index(b"IDAT") + 40] ^= 0xFF
    error = refusal(image_loader, job_request(prompt="?", images=[data_url(bytes(damaged))]))
    assert (type(error), error.code, error.field) == (Invalid, "image_broken", "images[0]")
