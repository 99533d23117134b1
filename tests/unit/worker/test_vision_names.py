"""The names of the vision families are known without MLX, and both lists agree."""

from __future__ import annotations

import pytest

pytest.importorskip("mlx_vlm")

from shared.models.folder import VISION_FAMILIES
from worker.runner.vision.families import FAMILIES


def test_both_lists_of_vision_families_have_the_same_names() -> None:
    assert set(VISION_FAMILIES) == set(FAMILIES)
