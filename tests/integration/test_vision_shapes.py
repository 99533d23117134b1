"""The shapes of vision models that `scripts/make_tiny_model` creates load with their image encoders."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("mlx_vlm")

from scripts.model_files.make_tiny_model import make_tiny_model
from scripts.model_files.shapes import SHAPES
from worker.runner.vision.load import load_vision_model


@pytest.mark.parametrize("name", [name for name, shape in SHAPES.items() if "vision_config" in shape.config])
def test_the_shape_loads_with_its_image_encoder(tmp_path: Path, smollm2_path: Path, name: str) -> None:
    make_tiny_model(tmp_path / "model", smollm2_path, SHAPES[name])
    loaded, half = load_vision_model(tmp_path / "model", lazy=True)
    assert loaded.config["model_type"] == SHAPES[name].config["model_type"]
    assert half.encoder.layout(448, 448).tokens > 1
    assert half.encoder.blocks > 1
