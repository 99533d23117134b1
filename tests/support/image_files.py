"""Image files for tests: random colored squares, different for each seed."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from PIL import Image


def picture(
    width: int = 300, height: int = 200, seed: int = 1, form: str = "PNG", mode: str = "RGB", **save: Any
) -> bytes:
    """Return an image file; `save` are Pillow's options for the format."""
    colors = np.random.default_rng(seed).integers(0, 255, (height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8)
    file = io.BytesIO()
    image = Image.fromarray(colors).resize((width, height), Image.Resampling.NEAREST).convert(mode)
    image.save(file, form, **save)
    return file.getvalue()


def data_url(file: bytes, media_type: str = "image/png") -> str:
    """Return a file as a data URL."""
    return f"data:{media_type};base64,{base64.b64encode(file).decode()}"
