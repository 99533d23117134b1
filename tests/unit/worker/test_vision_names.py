"""The names of the vision families are known without MLX, both lists agree, and the documentation has them."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("mlx_vlm")

from shared.models.folder import VISION_FAMILIES
from shared.settings import ROOT
from worker.runner.vision.families import FAMILIES


def test_both_lists_of_vision_families_have_the_same_names() -> None:
    assert set(VISION_FAMILIES) == set(FAMILIES)


def test_the_documentation_lists_every_family() -> None:
    words = set(re.findall(r"\w+", (ROOT / "docs/models.md").read_text("utf-8")))
    assert set(VISION_FAMILIES) <= words
