"""How many tokens an image takes in a prompt: a rule for each kind of image processor.

The worker that loads a model publishes the rule with the settings of the model's processor
(`worker.runner.vision.token_rules`), because only the processor knows them all: it combines several files, defaults and
overrides. The API then counts from the width and height of an image alone. Every rule computes exactly what the
processor does, including its rounding; the order of divisions matters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Protocol

from shared.models.image_geometry import check_aspect_ratio
from shared.models.image_grids import CroppedGrid, PatchBudget, PatchRows, PooledGrid, ResizedGrid
from shared.models.image_tiles import LfmTiles, PinpointTiles, SquareTiles, TileRows, WholeAndCrops
from shared.wire import known_fields


class ImageTokens(Protocol):
    """A rule. Its fields are the settings, as they are published."""

    def tokens(self, width: int, height: int) -> int:
        """Return the tokens of an image, with those that separate its rows or tiles; see `image_tokens`.

        Raises:
            ValueError, ArithmeticError: the processor refuses images of this size.
        """
        ...


def image_tokens(rule: ImageTokens, width: int, height: int) -> int:
    """Return how many tokens an image takes, at least one.

    Raises:
        ValueError: the model does not support images of this size.
    """
    check_aspect_ratio(width, height)
    try:
        tokens = rule.tokens(width, height)
    except ArithmeticError:
        tokens = 0
    if tokens < 1:
        raise ValueError(f"an image of {width} x {height} pixels is too small or too narrow")
    return tokens


def to_record(rule: ImageTokens) -> dict[str, Any]:
    """Return a rule as it is published."""
    (name,) = (name for name, kind in _RULES.items() if type(rule) is kind)
    return {"rule": name, **asdict(rule)}  # type: ignore[call-overload] # every rule is a dataclass


def from_record(record: Mapping[str, Any]) -> ImageTokens | None:
    """Return a published rule; None if only newer processes know it."""
    kind = _RULES.get(str(record.get("rule")))
    try:
        return kind(**known_fields(kind, record)) if kind else None
    except TypeError:
        return None


@dataclass(frozen=True, slots=True)
class FixedTokens:
    """Every image is resized or cropped to the same size: LLaVA, Gemma 3."""

    number: int

    def tokens(self, width: int, height: int) -> int:  # noqa: ARG002 - the size makes no difference
        """See `ImageTokens.tokens`."""
        return self.number


_RULES: Final[Mapping[str, type[ImageTokens]]] = {
    "fixed": FixedTokens,
    "patch_rows": PatchRows,
    "square_tiles": SquareTiles,
    "lfm_tiles": LfmTiles,
    "tile_rows": TileRows,
    "cropped_grid": CroppedGrid,
    "pooled_grid": PooledGrid,
    "pinpoint_tiles": PinpointTiles,
    "whole_and_crops": WholeAndCrops,
    "resized_grid": ResizedGrid,
    "patch_budget": PatchBudget,
}
"""The rules by the name with which they are published."""
