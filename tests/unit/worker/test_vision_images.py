"""Image files as a model gets them: upright and in 8-bit RGB, whatever their format."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("mlx.core")

from tests.support.image_files import picture
from worker.runner.vision.images import decode_image

GRADIENT = np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)


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
