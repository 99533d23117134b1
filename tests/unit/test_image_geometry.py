"""The size that a model sees is the one that mlx-vlm's processor gives it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.image_geometry import ImageGeometry

processing = pytest.importorskip("mlx_vlm.models.qwen3_vl.processing_qwen3_vl")

UI_TARS = ImageGeometry(28, 3136, 12845056)
SIDE = st.integers(1, 6000)


@given(SIDE, SIDE, st.sampled_from([UI_TARS, ImageGeometry(28, 78400, 2116800), ImageGeometry(32, 65536, 16777216)]))
def test_it_resizes_as_the_processor_does(width: int, height: int, geometry: ImageGeometry) -> None:
    processor = processing.Qwen3VLImageProcessor(
        patch_size=geometry.factor // 2, min_pixels=geometry.min_pixels, max_pixels=geometry.max_pixels
    )
    try:
        high, wide = processor._resolved_size(height, width)
    except ValueError:
        with pytest.raises(ValueError, match="200 times"):
            geometry.resized(width, height)
    else:
        assert geometry.resized(width, height) == (wide, high)


def test_screens() -> None:
    assert UI_TARS.resized(1920, 1080) == (1932, 1092)
    assert UI_TARS.resized(300, 200) == (308, 196)
    assert UI_TARS.resized(10, 10) == (56, 56)
