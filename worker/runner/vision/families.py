"""The families of vision models: for each `model_type` of config.json, how its images become tokens and features.

The names are also in `shared.models.folder.VISION_FAMILIES`, which processes without MLX read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import mlx.core as mx
from mlx_vlm import utils

from worker.runner.vision import images, token_rules
from worker.runner.vision.deepseek_ocr import DeepseekOCR2Encoder, DeepseekOCREncoder
from worker.runner.vision.gemma import Gemma4Language
from worker.runner.vision.generic_encoder import GenericEncoder
from worker.runner.vision.half import Encoder, Expand
from worker.runner.vision.language import ImageLanguageModel, PassInputs, add_image_features
from worker.runner.vision.llava_next import LlavaNextEncoder, load_without_language
from worker.runner.vision.mrope import Axes, use_mrope
from worker.runner.vision.qwen_encoder import DeepstackEncoder, QwenEncoder, WindowEncoder
from worker.runner.vision.token_rules import TokenRule


@dataclass(frozen=True, slots=True)
class Parts:
    """What a vision model is made of.

    Attributes:
        config: content of config.json.
        text: mlx-lm's language model.
        model: mlx-vlm's model. The weights of its language model are not loaded.
        processor: mlx-vlm's processor.
        tokenizer: mlx-lm's wrapper of the tokenizer.
        image_token: the placeholder.
        inputs: what the layers of the language model read during a pass.
    """

    folder: Path
    config: Mapping[str, Any]
    text: Any
    model: Any
    processor: Any
    tokenizer: Any
    image_token: int
    inputs: PassInputs = field(default_factory=PassInputs)

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The part of config.json that describes the language model."""
        section: Mapping[str, Any] = self.config.get("text_config") or self.config
        return section


def plain_expand(parts: Parts) -> Expand:
    """Replace the placeholders; positions count image tokens like text."""
    return lambda tokens, placed: images.expand(tokens, parts.image_token, placed)


def mrope_expand(parts: Parts) -> Expand:
    """Replace the placeholders, and place image tokens in rows and columns."""

    def expand(tokens: Any, placed: Any) -> tuple[list[int], images.ImageMedia]:
        expanded, media = images.expand(tokens, parts.image_token, placed)
        return expanded, images.with_grid_positions(media, len(expanded))

    return expand


def plain_language(parts: Parts) -> ImageLanguageModel:
    """Let mlx-lm's language model read image tokens."""
    return ImageLanguageModel(parts.text, parts.image_token, parts.inputs)


def _whole_model(folder: Path) -> Any:
    return utils.load_model(folder, lazy=True)


@dataclass(frozen=True, slots=True)
class VisionFamily:
    """How the models of a family work. Each field makes a part of a `VisionHalf` or its language model.

    Attributes:
        encoder: makes the image encoder, with the language model for the embeddings of text.
        placeholder: names of fields of config.json with the token that stands for an image, or its text.
        placeholder_text: the text of that token if config.json does not have it.
        expand: makes the function that replaces the placeholders in a prompt.
        language: makes the language model.
        tokens: returns the rule by which the API counts the tokens of images; not for encoders with a `geometry`.
        model: loads mlx-vlm's model of a folder without reading the weights.
    """

    encoder: Callable[[Parts, ImageLanguageModel], Encoder]
    placeholder: tuple[str, ...] = ("image_token_id", "image_token_index")
    placeholder_text: str | None = None
    expand: Callable[[Parts], Expand] = plain_expand
    language: Callable[[Parts], ImageLanguageModel] = plain_language
    tokens: TokenRule = token_rules.unknown
    model: Callable[[Path], Any] = _whole_model


def _mrope_language(axes: Axes) -> Callable[[Parts], ImageLanguageModel]:
    def language(parts: Parts) -> ImageLanguageModel:
        text = parts.text_config
        settings = {**(text.get("rope_parameters") or {}), **(text.get("rope_scaling") or {})}
        use_mrope(parts.text, axes, settings["mrope_section"], parts.inputs)
        tower = getattr(parts.model, "vision_tower", None)
        deepstack = getattr(tower, "deepstack_visual_indexes", None) or ()
        add_image_features(parts.text.layers[: len(deepstack)], parts.inputs)
        return plain_language(parts)

    return language


def _qwen(encoder: Callable[[Any, Any], Encoder], axes: Axes) -> VisionFamily:
    return VisionFamily(
        encoder=lambda parts, _language: encoder(parts.model.vision_tower, parts.processor.image_processor),
        expand=mrope_expand,
        language=_mrope_language(axes),
    )


def _generic(
    text: str | None = None, encoder_class: type[GenericEncoder] = GenericEncoder, **fields: Any
) -> VisionFamily:
    """Return a family whose images are encoded by mlx-vlm's `get_input_embeddings`.

    Args:
        text: what the processor replaces with the tokens of an image; None: the placeholder.
        fields: further fields of `VisionFamily`.
    """

    def encoder(parts: Parts, language: ImageLanguageModel) -> Encoder:
        placeholder = text or parts.tokenizer.convert_ids_to_tokens(parts.image_token)
        return encoder_class(parts.model, parts.processor, language, placeholder)

    return VisionFamily(encoder, **fields)


def _gemma4_language(parts: Parts) -> ImageLanguageModel:
    token = parts.image_token
    return Gemma4Language(parts.text, token, parts.inputs, feature_token=token, whole=_attends_within_images(parts))


def _gemma4_expand(parts: Parts) -> Expand:
    def expand(tokens: Any, placed: Any) -> tuple[list[int], images.ImageMedia]:
        expanded, media = images.expand(tokens, parts.image_token, placed)
        return expanded, replace(media, whole=_attends_within_images(parts))

    return expand


def _target_layers(config: Any) -> list[int]:
    """Return the layers before which image features are added, in the order of the features.

    Args:
        config: mlx-vlm's configuration of the model.
    """
    layers = [layer for _, layer in config.deepstack_layer_map or ()]
    return layers + (list(config.spatial_target_layers or ()) if config.use_spatial_sampling else [])


class _GraniteEncoder(GenericEncoder):
    """The encoder of Granite 4 Vision, whose image features enter the language model before several of its layers.

    The features of the first layer are added to the embeddings.
    """

    def __init__(self, model: Any, processor: Any, language: ImageLanguageModel, placeholder: str) -> None:
        self._targets: Sequence[int] = _target_layers(model.config)
        self._multiplier = float(language.args.embedding_multiplier)
        super().__init__(model, processor, language, placeholder)

    def _packed(self, found: Any) -> mx.array:
        by_layer = dict(zip(self._targets, found.deepstack_visual_embeds, strict=True))
        embeds = found.inputs_embeds[0]
        if (first := by_layer.pop(0, None)) is not None:
            embeds = embeds + first / self._multiplier  # the language model multiplies its input
        return mx.stack([embeds, *by_layer.values()])


def _granite_language(parts: Parts) -> ImageLanguageModel:
    before = [layer - 1 for layer in _target_layers(parts.model.config) if layer]
    add_image_features([parts.text.layers[layer] for layer in before], parts.inputs)
    return plain_language(parts)


def _attends_within_images(parts: Parts) -> bool:
    return parts.text_config.get("use_bidirectional_attention") == "vision"


_MROPE: Final[Mapping[str, Any]] = {"expand": mrope_expand, "language": _mrope_language(Axes.SECTIONS)}
_QWEN3: Final = _qwen(DeepstackEncoder, Axes.INTERLEAVED)

FAMILIES: Final[Mapping[str, VisionFamily]] = {
    "qwen2_vl": _qwen(QwenEncoder, Axes.SECTIONS),
    "qwen2_5_vl": _qwen(WindowEncoder, Axes.SECTIONS),
    "qwen3_vl": _QWEN3,
    "qwen3_vl_moe": _QWEN3,
    "qwen3_5": _QWEN3,
    "qwen3_5_moe": _QWEN3,
    **dict.fromkeys(("glm4v", "glm4v_moe", "glm_ocr"), _generic(tokens=token_rules.glm, **_MROPE)),
    "paddleocr_vl": _generic(tokens=token_rules.paddleocr, **_MROPE),
    **dict.fromkeys(("pixtral", "mistral3"), _generic(tokens=token_rules.pixtral)),
    **dict.fromkeys(("idefics3", "smolvlm"), _generic(tokens=token_rules.idefics)),
    "lfm2_vl": _generic(tokens=token_rules.lfm2),
    "llava": _generic(tokens=token_rules.llava),
    "internvl": _generic(tokens=token_rules.internvl),
    "internvl_chat": _generic("<image>", placeholder_text="<IMG_CONTEXT>", tokens=token_rules.internvl),
    "kimi_vl": _generic(placeholder=("media_placeholder_token_id",), tokens=token_rules.kimi),
    "gemma3": _generic(placeholder_text="<start_of_image>", tokens=token_rules.gemma3),
    "llava_next": _generic(encoder_class=LlavaNextEncoder, model=load_without_language, tokens=token_rules.llava_next),
    "deepseekocr": _generic(
        encoder_class=DeepseekOCREncoder, placeholder_text="<image>", tokens=token_rules.deepseek_ocr
    ),
    "deepseekocr_2": _generic(
        encoder_class=DeepseekOCR2Encoder, placeholder_text="<image>", tokens=token_rules.deepseek_ocr_2
    ),
    **dict.fromkeys(
        ("nemotron_h_nano_omni", "NemotronH_Nano_Omni_Reasoning_V3", "nemotron_h_omni"),
        _generic(placeholder=("img_context_token_id",), tokens=token_rules.nemotron),
    ),
    "granite4_vision": _generic(encoder_class=_GraniteEncoder, language=_granite_language, tokens=token_rules.granite),
    "gemma4": _generic(language=_gemma4_language, expand=_gemma4_expand, tokens=token_rules.gemma4),
}
