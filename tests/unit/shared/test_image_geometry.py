"""Resized image dimensions equal those of mlx-vlm, and what coordinates in answers refer to."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.models.facts import declared_coordinates
from shared.models.image_geometry import Coordinates, ImageGeometry

processing = pytest.importorskip("mlx_vlm.models.qwen3_vl.processing_qwen3_vl")

LIMITS = [
    (56 * 56, 14 * 14 * 4 * 1280),  # default of mlx-vlm
    (3136, 12_845_056),  # Qwen2.5-VL
    (100 * 28 * 28, 16384 * 28 * 28),  # UI-TARS 1.5
    (65_536, 16_777_216),  # Qwen3-VL
    (1, 784),
    (200_000, 200_000),
]
PATCHES = [14, 16]
SIDES = st.one_of(st.integers(1, 200), st.integers(1, 20_000))


def mlx_vlm_size(patch: int, limits: tuple[int, int], width: int, height: int) -> tuple[int, int]:
    processor = processing.Qwen3VLImageProcessor(
        patch_size=patch, merge_size=2, min_pixels=limits[0], max_pixels=limits[1]
    )
    resized_height, resized_width = processor._resolved_size(height, width)
    return resized_width, resized_height


def outcome(resize: object, *arguments: object) -> object:
    assert callable(resize)
    try:
        return resize(*arguments)
    except ValueError:
        return ValueError


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("patch", PATCHES)
@given(width=SIDES, height=SIDES)
def test_size_equals_that_of_mlx_vlm(patch: int, limits: tuple[int, int], width: int, height: int) -> None:
    ours = ImageGeometry(2 * patch, *limits)
    assert outcome(ours.resized, width, height) == outcome(mlx_vlm_size, patch, limits, width, height)


@pytest.mark.parametrize("limits", LIMITS)
@given(width=st.integers(1, 150), offset=st.integers(-1, 1))
def test_size_near_the_maximum_aspect_ratio(limits: tuple[int, int], width: int, offset: int) -> None:
    height = 200 * width + offset
    ours = ImageGeometry(28, *limits)
    assert outcome(ours.resized, width, height) == outcome(mlx_vlm_size, 14, limits, width, height)
    assert outcome(ours.resized, height, width) == outcome(mlx_vlm_size, 14, limits, height, width)


@pytest.mark.parametrize(
    ("size", "resized"),
    [
        ((1920, 1080), (1932, 1092)),
        ((28, 28), (280, 280)),
        ((10_000, 10_000), (3556, 3556)),  # exactly 3584 without rounding errors, which mlx-vlm has as well
    ],
)
def test_typical_sizes(size: tuple[int, int], resized: tuple[int, int]) -> None:
    assert ImageGeometry(28, 100 * 28 * 28, 16384 * 28 * 28).resized(*size) == resized


@pytest.mark.parametrize("size", [(0, 10), (10, 0), (0, 0), (-5, -5), (1, 201), (201, 1)])
def test_invalid_size_is_an_error(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="pixels"):
        ImageGeometry(28, 3136, 12_845_056).resized(*size)


@pytest.mark.parametrize(
    ("model_type", "coordinates"),
    [
        ("qwen2_vl", Coordinates.THOUSANDTHS),  # also UI-TARS 1.0
        ("qwen2_5_vl", Coordinates.PIXELS),  # also UI-TARS 1.5
        ("qwen3_vl", Coordinates.THOUSANDTHS),
        ("qwen3_vl_moe", Coordinates.THOUSANDTHS),
        ("qwen3_5", Coordinates.THOUSANDTHS),
        ("qwen3_5_moe", Coordinates.THOUSANDTHS),
        ("gemma3", Coordinates.THOUSANDTHS),
        ("gemma4", Coordinates.PIXELS),
        (None, Coordinates.PIXELS),
    ],
)
def test_coordinates_depend_on_the_type_of_the_whole_model(
    tmp_path: Path, model_type: str | None, coordinates: Coordinates
) -> None:
    config = {"model_type": model_type, "text_config": {"model_type": "qwen3_vl_text"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert declared_coordinates(tmp_path) is coordinates
