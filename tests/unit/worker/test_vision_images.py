"""Image files as a model gets them: upright and in 8-bit RGB, whatever their format."""

from __future__ import annotations

import io
import zlib

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("mlx.core")

from shared.image_files import FORMATS, TooManyPixels
from tests.support.image_files import picture
from worker.runner.vision import images

PIXELS = 300 * 200
GRADIENT = np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)


def decode_image(file: bytes) -> Image.Image:
    return images.decode_image(file, PIXELS)


def file_of(image: Image.Image, form: str = "PNG", **save: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **save)
    return file.getvalue()


def test_16_bit_gray_is_scaled_to_8_bits() -> None:
    seen = np.asarray(decode_image(file_of(Image.fromarray(GRADIENT))))
    assert seen.shape == (48, 64, 3)
    assert (seen == (GRADIENT >> 8).astype(np.uint8)[..., None]).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_every_mode_is_converted_to_rgb(mode: str) -> None:
    form = "JPEG" if mode == "CMYK" else "PNG"
    image = Image.fromarray(GRADIENT) if mode.startswith("I") else Image.new("L", (64, 48), 200).convert(mode)
    seen = decode_image(file_of(image.convert(mode), form))
    assert (seen.mode, seen.size) == ("RGB", (64, 48))
    assert 100 < np.asarray(seen).mean() < 230 or mode == "1"


def test_the_first_frame_is_used_and_the_exif_orientation_is_applied() -> None:
    red, blue = Image.new("RGB", (64, 48), "red"), Image.new("RGB", (64, 48), "blue")
    for form in ("GIF", "WEBP"):
        frames = file_of(red, form, save_all=True, append_images=[blue], duration=100)
        assert decode_image(frames).getpixel((5, 5))[0] > 200  # type: ignore[index]
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(picture(form="JPEG", exif=exif.tobytes())).size == (200, 300)


def grey_ink() -> Image.Image:
    """The same without transparency: the background has the value 9."""
    return Image.eval(ink("LA").getchannel("A"), lambda alpha: 0 if alpha else 9)


def ink(mode: str) -> Image.Image:
    """A black square on a transparent background, whose hidden color is black too."""
    image = Image.new("LA", (64, 48), (0, 0))
    image.paste((0, 255), (16, 16, 48, 32))
    if mode == "P":
        flat = Image.new("P", (64, 48), 7)
        flat.putpalette([0, 0, 0] * 256)
        flat.paste(3, (16, 16, 48, 32))
        return flat
    return image.convert(mode)


TRANSPARENT: dict[str, bytes] = {
    "PNG RGBA": file_of(ink("RGBA")),
    "PNG LA": file_of(ink("LA")),
    "PNG palette, one transparent color": file_of(ink("P"), transparency=7),
    "PNG palette, alpha for each color": file_of(ink("P"), transparency=bytes([255] * 7 + [0])),
    "PNG grey, one transparent value": file_of(grey_ink(), transparency=9),
    "PNG RGB, one transparent color": file_of(Image.merge("RGB", [grey_ink()] * 3), transparency=(9, 9, 9)),
    "WebP lossless": file_of(ink("RGBA"), "WEBP", lossless=True, exact=True),
    "WebP lossy": file_of(ink("RGBA"), "WEBP"),
    "WebP animated": file_of(ink("RGBA"), "WEBP", save_all=True, append_images=[ink("RGBA").rotate(90)], lossless=True),
    "GIF": file_of(ink("P"), "GIF", transparency=7),
    "GIF animated": file_of(ink("P"), "GIF", transparency=7, save_all=True, append_images=[ink("P").rotate(90)]),
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSPARENT)
def test_transparent_pixels_are_white(name: str) -> None:
    """Black ink on a transparent background, as people see it."""
    seen = np.asarray(decode_image(TRANSPARENT[name]).convert("L"))
    assert seen[4, 4] > 250
    assert seen[24, 32] < 5


def test_half_transparent_pixels_are_mixed_with_white() -> None:
    assert decode_image(file_of(Image.new("RGBA", (8, 8), (255, 0, 0, 127)))).getpixel((4, 4)) == (255, 128, 128)


def test_a_transparent_value_of_16_bit_gray_is_white() -> None:
    image = Image.fromarray(np.full((8, 8), 500, np.uint16))
    file = file_of(image)
    chunk = b"tRNS" + (500).to_bytes(2)
    marked = file[:33] + (2).to_bytes(4) + chunk + zlib.crc32(chunk).to_bytes(4) + file[33:]
    assert np.asarray(decode_image(marked)).min() == 255
    assert np.asarray(decode_image(file)).max() == 1


def test_only_the_formats_of_the_api_are_opened() -> None:
    """Each format has its own decoder, which the API's check did not run."""
    Image.init()
    opened = set()
    for form in Image.SAVE:
        try:
            file = file_of(Image.new("RGB", (64, 48)), form)
        except Exception:  # noqa: BLE001 - Pillow lists formats that it cannot write here
            continue
        try:
            decode_image(file)
            opened.add(form)
        except Exception:  # noqa: BLE001 - decoders raise any exception
            assert form not in FORMATS
    assert set(FORMATS) <= opened <= {*FORMATS, "MPO", "WEBP"}


def test_an_image_with_more_pixels_than_the_api_checked_is_not_decoded() -> None:
    with pytest.raises(TooManyPixels):
        decode_image(picture(301, 200))


def test_prefixes_of_earlier_decodings_are_not_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefixes on disk are found by token ids."""
    current = images._token_ids("digest", 4)
    monkeypatch.setattr(images, "_DECODING", images._DECODING - 1)
    assert set(images._token_ids("digest", 4)).isdisjoint(current)
