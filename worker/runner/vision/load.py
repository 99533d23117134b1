"""Loads vision models: the language model with mlx-lm, the image encoder with mlx-vlm."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path
from typing import Any, Final

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_vlm import utils

from shared.models.folder import VISION_FAMILIES, ModelError, check_adapter, check_folder
from shared.models.image_tokens import to_record
from worker.models import text_half
from worker.models.image_templates import for_images
from worker.models.load import NO_CODE, LoadedModel, contained, loaded_as, tokenizer_config
from worker.runner.vision.families import FAMILIES, Parts, VisionFamily
from worker.runner.vision.half import VisionHalf
from worker.runner.vision.token_rules import proven_rule

_ENCODER_FAILS: Final = 'The image encoder in {} cannot be loaded; kind = "text" in the catalog serves only text'


def load_vision_model(
    folder: Path, *, adapter: Path | None = None, lazy: bool = False
) -> tuple[LoadedModel, VisionHalf]:
    """Load a model folder.

    Args:
        adapter: a folder of LoRA weights to apply to the language model.
        lazy: do not read the weights yet.

    Returns:
        The language model with its tokenizer, and the image half.

    Raises:
        ModelError: the folder is incomplete, broken or of an unsupported family.
    """
    check_folder(folder)
    if adapter is not None:
        check_adapter(adapter)
    folder = folder.resolve()  # the libraries take a relative path for a hub id
    with contained(f"The model in {folder} cannot be loaded"):
        config = utils.load_config(folder)
        family = FAMILIES.get(config.get("model_type", ""))
        if family is None:
            raise ModelError(
                f"{folder}: images are not supported for model_type {config.get('model_type')!r}, only for "
                f"{', '.join(VISION_FAMILIES)}."
            )
    with contained(_ENCODER_FAILS.format(folder)):
        model = family.model(folder)
        weights = _take_weights(model.language_model)
    with contained(f"The model in {folder} cannot be loaded"):
        text = text_half.load(folder, tokenizer_config(folder), adapter=adapter, lazy=lazy, weights=weights or None)
    with contained(_ENCODER_FAILS.format(folder)):
        loaded, vision = _put_together(family, _parts(folder, config, family, model, text))
        if not lazy:
            mx.eval(loaded.model.parameters(), vision.encoder.tower.parameters())
        return loaded, vision


def _parts(
    folder: Path, config: Mapping[str, Any], family: VisionFamily, model: Any, text_parts: text_half.Loaded
) -> Parts:
    text, tokenizer, text_config = text_parts
    tokenizer.chat_template = for_images(folder, tokenizer.chat_template)
    with redirect_stdout(StringIO()):  # some processors print what they add to the tokenizer
        processor = utils.load_processor(folder, add_detokenizer=False, **NO_CODE)
    token = _placeholder(family, {**vars(model.config), **config}, tokenizer)
    return Parts(folder, {**config, **text_config}, text, model, processor, tokenizer, token)


def _put_together(family: VisionFamily, parts: Parts) -> tuple[LoadedModel, VisionHalf]:
    language = family.language(parts)
    encoder = family.encoder(parts, language)
    language.encode = encoder.encode
    loaded = loaded_as("vision", parts.folder, language, parts.tokenizer, dict(parts.config))
    if encoder.geometry is not None:
        loaded = replace(loaded, card=replace(loaded.card, image=asdict(encoder.geometry)))
    elif rule := proven_rule(family.tokens, parts.processor, encoder.layout):
        loaded = replace(loaded, card=replace(loaded.card, image_tokens=to_record(rule)))
    return loaded, VisionHalf(parts.image_token, encoder, family.expand(parts))


def _take_weights(language_model: Any) -> dict[str, mx.array]:
    """Remove and return the weights of mlx-vlm's language model, which have not been read.

    mlx-vlm knows how checkpoints of its families name, shape and quantise weights. Its names are those of a folder that
    it has converted.
    """
    found: dict[str, mx.array] = dict(tree_flatten(language_model.parameters()))
    output = found.get("lm_head.weight")
    if any(array is output for path, array in found.items() if path != "lm_head.weight"):
        # mlx-vlm reads a tied embedding twice, for example in Gemma 3. mlx-lm ties it.
        found = {path: array for path, array in found.items() if not path.startswith("lm_head.")}
    for _, module in language_model.named_modules():
        for name in [name for name, value in module.items() if isinstance(value, mx.array)]:
            del module[name]
    return {f"language_model.{path}": array for path, array in found.items()}


def _placeholder(family: VisionFamily, config: Mapping[str, Any], tokenizer: Any) -> int:
    """Return the token that stands for an image in a prompt."""
    named = (config[name] for name in family.placeholder if config.get(name) is not None)
    value = family.placeholder_text or next(named, None)
    token = tokenizer.convert_tokens_to_ids(value) if isinstance(value, str) else value
    if token is None:
        raise ValueError(f"the tokenizer has no image token {value!r}, or config.json names none")
    return int(token)
