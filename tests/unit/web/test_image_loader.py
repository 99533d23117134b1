"""Images of requests: what is taken, what is refused, and how that is told."""

from __future__ import annotations

import io
import struct
import threading
import time
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


def asked(**body: Any) -> JobRequest:
    return JobRequest.model_validate(body)


def shown(content: Any) -> JobRequest:
    return asked(messages=[{"role": "user", "content": content}])


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
def test_a_part_becomes_what_the_record_says_of_it(image_loader: ImageLoader, part: dict[str, Any]) -> None:
    found = image_loader.load(shown([part, TEXT]))
    assert found.files == {digest(PNG): PNG}
    assert found.request.conversation(has_template=True) == ({"role": "user", "content": [STORED, TEXT]},)
    assert URL not in found.request.meaning()


@pytest.mark.parametrize("body", [{"prompt": "What?"}, {"messages": [{"role": "user", "content": "What?"}]}])
def test_loose_images_come_before_what_the_user_says(image_loader: ImageLoader, body: dict[str, Any]) -> None:
    for kind in (JobRequest, InferenceRequest):
        found = image_loader.load(kind.model_validate({**body, "images": [URL]}), [picture(seed=2)])
        (turn,) = found.request.conversation(has_template=True) or ()
        assert [part["type"] for part in turn["content"]] == ["image", "image", "text"]
        assert turn["content"][0] == STORED
        assert turn["content"][2] == TEXT
        assert list(found.files) == [digest(PNG), digest(picture(seed=2))]


def test_loose_images_go_to_the_last_thing_the_user_says(image_loader: ImageLoader) -> None:
    turns = [("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c")]
    request = asked(messages=[{"role": role, "content": text} for role, text in turns], images=[URL])
    told = image_loader.load(request).request.conversation(has_template=True) or ()
    assert [turn["content"] for turn in told[:3]] == ["Be brief.", "a", "b"]
    assert told[3]["content"] == [STORED, {"type": "text", "text": "c"}]


def test_a_raw_prompt_takes_no_images(image_loader: ImageLoader) -> None:
    for body, uploads in (({"images": [URL]}, []), ({}, [PNG])):
        with pytest.raises(Invalid) as caught:
            image_loader.load(InferenceRequest.model_validate({"prompt": "?", "raw": True, **body}), uploads)
        assert caught.value.field == "raw"


def test_the_same_image_is_kept_once(image_loader: ImageLoader) -> None:
    found = image_loader.load(shown([{"type": "image", "image": URL}, {"type": "image", "image": URL}, TEXT]))
    assert len(found.files) == 1
    assert [part["type"] for part in (found.request.conversation(has_template=True) or ())[0]["content"]] == [
        "image", "image", "text",
    ]  # fmt: skip


def test_how_an_image_is_written_makes_no_other_request(image_loader: ImageLoader) -> None:
    ways = [{"type": "image", "image": URL}, {"type": "image_url", "image_url": {"url": data_url(PNG, "image/jpeg")}}]
    assert len({image_loader.load(shown([way, TEXT])).request.meaning() for way in ways}) == 1
    other = {"type": "image", "image": data_url(picture(seed=9))}
    assert (
        image_loader.load(shown([other, TEXT])).request.meaning()
        != image_loader.load(shown([ways[0], TEXT])).request.meaning()
    )


def test_parts_that_are_all_text_are_one_text(image_loader: ImageLoader) -> None:
    request = image_loader.load(shown([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])).request
    assert request.conversation(has_template=True) == ({"role": "user", "content": "a\nb"},)


@pytest.mark.parametrize(
    ("form", "mode", "save"),
    [
        ("PNG", "RGB", {}), ("PNG", "RGBA", {}), ("PNG", "P", {}), ("PNG", "L", {}), ("PNG", "1", {}),
        ("JPEG", "RGB", {}),
        ("JPEG", "CMYK", {}), ("WEBP", "RGBA", {}), ("GIF", "P", {}),
        ("GIF", "P", {"save_all": True, "append_images": [Image.new("P", (300, 200), 3)]}),
    ],
)  # fmt: skip
def test_kinds_of_images(image_loader: ImageLoader, form: str, mode: str, save: dict[str, Any]) -> None:
    found = image_loader.load(
        shown([{"type": "image", "image": data_url(picture(form=form, mode=mode, **save))}, TEXT])
    )
    (turn,) = found.request.conversation(has_template=True) or ()
    assert (turn["content"][0]["width"], turn["content"][0]["height"]) == (300, 200)


def test_a_picture_taken_upright_is_as_high_as_it_looks(image_loader: ImageLoader) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    found = image_loader.load(asked(prompt="?", images=[data_url(picture(form="JPEG", exif=exif.tobytes()))]))
    (turn,) = found.request.conversation(has_template=True) or ()
    assert (turn["content"][0]["width"], turn["content"][0]["height"]) == (200, 300)


def bomb(width: int, height: int) -> bytes:
    """A PNG that says it has so many pixels, and has none."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def jpeg_of(scans: int, width: int = 64, height: int = 48) -> bytes:
    """A progressive JPEG, of which the last scan comes again and again."""
    file = picture(width, height, form="JPEG", progressive=True)
    last = file.rindex(b"\xff\xda")
    tables = file.rindex(b"\xff\xc4", 0, last)
    return file[:-2] + file[tables:-2] * (scans - file.count(b"\xff\xda")) + file[-2:]


def with_segments(segment: bytes, count: int) -> bytes:
    """A JPEG with so many segments at its beginning."""
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
        ("data:image/png,abc", "image_broken"),
        ("data:", "image_broken"),
        ("file:///etc/passwd", "image_url_refused"),
        ("/etc/passwd", "image_url_refused"),
        ("http://example.com/a.png", "image_url_refused"),
    ],
)
def test_what_is_no_image_is_refused_by_name(image_loader: ImageLoader, url: str, code: str) -> None:
    for request, field in (
        (asked(prompt="?", images=[URL, url]), "images[1]"),
        (shown([TEXT, {"type": "image_url", "image_url": {"url": url}}]), "messages[0].content[1]"),
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
def test_a_jpeg_that_takes_its_time_over_and_over_is_not_decoded(
    image_loader: ImageLoader, image: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "open", None)
    error = refusal(image_loader, asked(prompt="?", images=[data_url(image)]))
    assert (type(error), error.code, error.field) == (Invalid, "image_broken", "images[0]")
    assert "more segments" in error.detail


@pytest.mark.parametrize(
    "image",
    [
        jpeg_of(50), with_segments(EXIF, 200), with_segments(PROFILE, 255), picture(form="JPEG") + PROFILE * 100,
        picture(form="JPEG", restart_marker_blocks=1), picture(2000, 1500, form="JPEG", quality=100),
    ],
)  # fmt: skip
def test_a_jpeg_may_have_much_beside_its_picture(image_loader: ImageLoader, image: bytes) -> None:
    assert len(image_loader.load(asked(prompt="?", images=[data_url(image)])).files) == 1


@pytest.mark.parametrize("url", ["data:" + "A" * 10**7, "data:image/png" + ";a" * 5 * 10**6])
def test_a_data_url_without_data_is_not_looked_through(image_loader: ImageLoader, url: str) -> None:
    started_at = time.monotonic()
    assert refusal(image_loader, asked(prompt="?", images=[url])).code == "image_broken"
    assert time.monotonic() - started_at < 0.3


@pytest.mark.parametrize("size", [(200, 1), (20, 4000), (1, 1)])
def test_a_long_or_small_image_is_taken_as_far_as_models_do(image_loader: ImageLoader, size: tuple[int, int]) -> None:
    assert image_loader.load(asked(prompt="?", images=[data_url(picture(*size))])).files
    assert ImageGeometry(28, 3136, 12845056).resized(*size)


def test_an_upload_is_named_by_its_place_behind_the_others(image_loader: ImageLoader) -> None:
    assert refusal(image_loader, asked(prompt="?", images=[URL]), PNG, b"no").field == "images[2]"


def test_limits(settings: Settings) -> None:
    few = ImageLoader(settings.model_copy(update={"max_images": 2}), None)
    assert refusal(few, asked(prompt="?", images=[URL] * 3)).code == "too_many_images"
    error = refusal(few, shown([{"type": "image", "image": URL}] * 3))
    assert (error.code, error.field) == ("too_many_images", "messages[0].content[2]")
    small = ImageLoader(settings.model_copy(update={"max_image_bytes": len(PNG) - 1}), None)
    error = refusal(small, asked(prompt="?", images=[URL]))
    assert (type(error), error.code, error.field) == (TooLarge, "image_too_large", "images[0]")
    narrow = ImageLoader(settings.model_copy(update={"max_image_pixels": 300 * 200 - 1}), None)
    assert refusal(narrow, asked(prompt="?", images=[URL])).code == "image_too_many_pixels"
    fitting = settings.model_copy(update={"max_image_bytes": len(PNG), "max_image_pixels": 60_000, "max_images": 1})
    assert ImageLoader(fitting, None).load(asked(prompt="?", images=[URL])).files


@pytest.mark.parametrize(
    ("content", "where"),
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
def test_parts_that_do_not_fit_are_named(content: Any, where: tuple[object, ...]) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - pydantic's
        shown(content)
    assert caught.value.errors()[0]["loc"] == where  # type: ignore[attr-defined]


def test_urls_are_read_where_that_is_switched_on(settings: Settings) -> None:
    read: list[tuple[str, int, str]] = []

    def fetch(url: str, most: int, caller: str) -> bytes:
        read.append((url, most, caller))
        return PNG

    found = ImageLoader(settings, fetch).load(asked(prompt="?", images=["https://example.com/a.png"]), caller="me")
    assert found.files == {digest(PNG): PNG}
    assert read == [("https://example.com/a.png", settings.max_image_bytes, "me")]


def test_urls_are_told_apart_by_themselves_and_read_once(settings: Settings) -> None:
    pictures = iter([PNG, picture(seed=2)])
    image_loader = ImageLoader(settings, lambda *_: next(pictures))
    request = shown([{"type": "image", "image": "https://example.com/a.png"}, {"type": "image", "image": URL}, TEXT])
    request = request.model_copy(update={"images": ["http://example.com/a.png"]})
    first = image_loader.load(request, repeated=lambda: False)
    again = image_loader.load(request, repeated=lambda: True)
    assert first.meant.meaning() == again.meant.meaning() != first.request.meaning()
    assert (len(first.files), first.unread, len(again.files), again.unread) == (2, 0, 1, 2)
    other = request.model_copy(update={"images": ["http://example.com/b.png"]})
    assert image_loader.load(other, repeated=lambda: True).meant.meaning() != first.meant.meaning()


def test_nothing_is_asked_of_a_request_without_urls(settings: Settings) -> None:
    def repeated() -> bool:
        raise AssertionError

    image_loader = ImageLoader(settings, lambda *_: PNG)
    found = image_loader.load(asked(prompt="?", images=[URL]), [PNG], repeated=repeated)
    assert found.meant.meaning() == found.request.meaning()


def test_what_comes_from_urls_is_no_more_than_a_body_may_hold(settings: Settings) -> None:
    files = {f"https://example.com/{n}.png": picture(seed=n) for n in range(4)}
    most = sum(map(len, files.values()))
    fitting = ImageLoader(settings.model_copy(update={"max_body_bytes": most}), lambda url, *_: files[url])
    assert len(fitting.load(asked(prompt="?", images=[*files, *files])).files) == 4, "the same again is no more"
    small = ImageLoader(settings.model_copy(update={"max_body_bytes": most - 1}), lambda url, *_: files[url])
    error = refusal(small, asked(prompt="?", images=list(files)))
    assert (type(error), error.code, error.field) == (TooLarge, "image_too_large", "images[3]")


def test_few_images_are_decoded_at_once(image_loader: ImageLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, released = threading.Semaphore(0), threading.Event()

    def decode(data: bytes) -> tuple[int, int]:
        begun.release()
        assert released.wait(30)
        return 1, 1

    monkeypatch.setattr(image_loader, "_decoded_size", decode)
    with ThreadPoolExecutor(4) as pool:
        asking = [
            pool.submit(image_loader.load, asked(prompt="?", images=[data_url(picture(seed=n))])) for n in range(4)
        ]
        try:
            assert begun.acquire(timeout=10) and begun.acquire(timeout=10)
            assert not begun.acquire(timeout=0.2), "a third waits for one of them"
        finally:
            released.set()
        assert all(each.result(10).files for each in asking)


def test_a_png_with_a_wrong_checksum_is_broken(image_loader: ImageLoader) -> None:
    bent = bytearray(PNG)
    bent[PNG.index(b"IDAT") + 40] ^= 0xFF
    error = refusal(image_loader, asked(prompt="?", images=[data_url(bytes(bent))]))
    assert (type(error), error.code, error.field) == (Invalid, "image_broken", "images[0]")
