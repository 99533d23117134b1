"""The rules by which the API counts the tokens of images, from the settings of mlx-vlm's processors.

Each function returns None for settings that its rule does not cover.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Final, TypeAlias

from shared.models.image_grids import CroppedGrid, PatchBudget, PatchRows, PooledGrid, ResizedGrid
from shared.models.image_tiles import LfmTiles, PinpointTiles, SquareTiles, TileRows, WholeAndCrops
from shared.models.image_tokens import FixedTokens, ImageTokens, image_tokens
from worker.models.load import first_line
from worker.runner.vision.images import Layout

log = logging.getLogger(__name__)

TokenRule: TypeAlias = Callable[[Any], ImageTokens | None]
"""Returns the rule of a processor."""
_PROOFS: Final = ((40, 30), (90, 1000), (1280, 720))
"""Widths and heights, in pixels, for which a rule is compared with the processor."""


def proven_rule(make: TokenRule, processor: Any, layout: Callable[[int, int], Layout]) -> ImageTokens | None:
    """Return the rule of a processor, or None if they disagree: the API must not refuse what the model can read.

    Args:
        layout: runs the processor; see `Encoder.layout`.
    """
    try:
        rule = make(processor)
        counts = {size: (layout(*size).tokens, image_tokens(rule, *size)) for size in _PROOFS} if rule else {}
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError) as error:  # unexpected settings
        log.warning("image_token_rule_not_used", extra={"reason": first_line(error)})
        return None
    for size, (tokens, by_rule) in counts.items():
        if tokens != by_rule:
            reason = f"{rule} counts {by_rule} instead of {tokens} tokens for {size[0]} x {size[1]} pixels"
            log.warning("image_token_rule_not_used", extra={"reason": reason})
            return None
    return rule


def unknown(_processor: Any) -> None:
    """No rule: the tokens are known only in the worker."""


def pixtral(processor: Any) -> ImageTokens | None:
    """Pixtral and Mistral 3."""
    images = processor.image_processor
    longest = _get(images.size, "longest_edge")
    width, height = longest or _get(images.size, "width"), longest or _get(images.size, "height")
    if not images.do_resize or not width or not height:
        return None
    return PatchRows(int(width), int(height), processor.patch_size * processor.spatial_merge_size)


def lfm2(processor: Any) -> ImageTokens | None:
    """LFM2-VL."""
    images = processor.image_processor
    return LfmTiles(
        patch=images.encoder_patch_size,
        merge=images.downsample_factor,
        min_tokens=images.min_image_tokens,
        max_tokens=images.max_image_tokens,
        tolerance=images.max_pixels_tolerance,
        split=images.do_image_splitting,
        side=images.tile_size,
        min_tiles=images.min_tiles,
        max_tiles=images.max_tiles,
        thumbnail=images.use_thumbnail,
    )


def internvl(processor: Any) -> ImageTokens | None:
    """InternVL, in both formats."""
    images = processor.image_processor
    if not images.do_dynamic_preprocess:
        return FixedTokens(processor.num_image_token + 2)
    tiles = images.dynamic_min_num, images.dynamic_max_num
    return SquareTiles(images.size, *tiles, images.dynamic_use_thumbnail, processor.num_image_token)


def idefics(processor: Any) -> ImageTokens | None:
    """Idefics 3 and SmolVLM, whose markers of tiles are texts."""
    images = processor.image_processor
    longest, side = _get(images.size, "longest_edge"), _get(images.max_image_size, "longest_edge")
    if not images.do_resize or not longest or not side:
        return None

    def text(marker: str) -> int:
        return len(processor.tokenizer(marker, add_special_tokens=False).input_ids)

    around, tokens = text(processor.fake_image_token), processor.image_seq_len
    whole = getattr(processor, "global_image_token", None) or processor.global_image_tag
    return TileRows(
        longest=int(longest),
        side=int(side),
        split=images.do_image_splitting,
        tile_tokens=around + text("<row_1_col_1>") + tokens,
        whole_tokens=around + text(whole) + tokens + around,
        row_end=text("\n"),
        last_row_end=text("\n\n"),
    )


def llava(processor: Any) -> ImageTokens | None:
    """LLaVA with an encoder for images of one size."""
    if (size := _tile_size(processor.image_processor)) is None:
        return None
    width, height = size
    patches = (width // processor.patch_size) * (height // processor.patch_size)
    return FixedTokens(patches + processor.num_additional_image_tokens - _omits_class(processor))


def kimi(processor: Any) -> ImageTokens | None:
    """Kimi-VL."""
    images = processor.image_processor
    merge_height, merge_width = images.merge_kernel_size
    return CroppedGrid(images.patch_size, merge_width, merge_height, images.in_token_limit, images.pad_input)


def gemma3(processor: Any) -> ImageTokens | None:
    """Gemma 3 without pan and scan, which adds crops of wide images and text about them."""
    if processor.image_processor.do_pan_and_scan:
        return None
    return FixedTokens(processor.image_seq_length + 2)


def gemma4(processor: Any) -> ImageTokens | None:
    """Gemma 4."""
    images = processor.image_processor
    if not images.do_resize:
        return None
    return PooledGrid(images.patch_size, images.pooling_kernel_size, images.max_soft_tokens)


def granite(processor: Any) -> ImageTokens | None:
    """Granite 4 Vision."""
    kept = Fraction(processor.downsample_rate or 1)
    return _pinpoint_tiles(processor, kept, processor.num_additional_image_tokens - _omits_class(processor))


def llava_next(processor: Any) -> ImageTokens | None:
    """LLaVA-NeXT."""
    return _pinpoint_tiles(processor, Fraction(1), 0)


def deepseek_ocr(_processor: Any) -> ImageTokens:
    """DeepSeek-OCR, whose sizes are the same in all folders."""
    return WholeAndCrops(crop_side=640, max_crops=9, crop=10, whole=16, row_end=1)


def deepseek_ocr_2(_processor: Any) -> ImageTokens:
    """DeepSeek-OCR 2, whose sizes are the same in all folders."""
    return WholeAndCrops(crop_side=768, max_crops=6, crop=12, whole=16, row_end=0)


def glm(processor: Any) -> ImageTokens | None:
    """GLM-4V and GLM-OCR."""
    images = processor.image_processor
    side, frames = images.patch_size * images.merge_size, images.temporal_patch_size
    if size := getattr(images, "size", None):
        return ResizedGrid(side, int(_get(size, "shortest_edge")), int(_get(size, "longest_edge")), frames)
    return ResizedGrid(side, images.min_pixels, images.max_pixels, frames)


def paddleocr(processor: Any) -> ImageTokens | None:
    """PaddleOCR-VL."""
    images = processor.image_processor
    side = images.patch_size * images.merge_size
    return ResizedGrid(side, images.min_pixels, images.max_pixels, at_once=False)


def nemotron(processor: Any) -> ImageTokens | None:
    """Nemotron Nano Omni."""
    images = processor.image_processor
    merge = round(1 / images.downsample_ratio)
    budget = max((images.max_model_len - 4) * merge**2, images.min_num_patches)
    most = min(budget, images.max_num_patches) if images.max_num_patches else budget
    return PatchBudget(images.patch_size, merge, images.min_num_patches, max(most, images.min_num_patches))


def _pinpoint_tiles(processor: Any, kept: Fraction, additional: int) -> ImageTokens | None:
    """Return the rule for a grid of tiles.

    Args:
        kept: share of the patches of a side that become tokens.
        additional: tokens in addition, possibly negative.
    """
    images = processor.image_processor
    if (size := _tile_size(images)) is None or size[0] != size[1]:
        return None
    tile = int(size[0] // processor.patch_size * kept)
    resolutions = tuple((int(height), int(width)) for height, width in images.image_grid_pinpoints)
    return PinpointTiles(resolutions, size[0], tile, additional)


def _omits_class(processor: Any) -> bool:
    """Whether a token that stands for the whole image is left out."""
    return bool(processor.vision_feature_select_strategy == "default")


def _tile_size(images: Any) -> tuple[int, int] | None:
    """Return the width and height to which a processor crops or resizes; None if they depend on the image."""
    size = images.crop_size if images.do_center_crop else images.size
    width, height = _get(size, "width"), _get(size, "height")
    return (int(width), int(height)) if width and height else None


def _get(size: Any, name: str) -> Any:
    """Return a value of a processor's size, which is a dictionary or an object."""
    return size.get(name) if isinstance(size, dict) else getattr(size, name, None)
