"""Granite 4 Vision: image features enter the language model before several of its layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from worker.runner.vision.generic_encoder import GenericEncoder
from worker.runner.vision.language import ImageLanguageModel


def target_layers(config: Any) -> list[int]:
    """Return the layers before which image features are added, in the order of the features.

    Args:
        config: mlx-vlm's configuration of the model.
    """
    layers = [layer for _, layer in config.deepstack_layer_map or ()]
    return layers + (list(config.spatial_target_layers or ()) if config.use_spatial_sampling else [])


class GraniteEncoder(GenericEncoder):
    """See `GenericEncoder`. The features of the first layer are embeddings, and those of later layers are added."""

    def __init__(self, model: Any, processor: Any, language: ImageLanguageModel, placeholder: str) -> None:
        self._targets: Sequence[int] = target_layers(model.config)
        self._multiplier = float(language.args.embedding_multiplier)
        super().__init__(model, processor, language, placeholder)

    def _packed(self, found: Any) -> mx.array:
        by_layer = dict(zip(self._targets, found.deepstack_visual_embeds, strict=True))
        embeds = found.inputs_embeds[0]
        if (first := by_layer.pop(0, None)) is not None:
            embeds = embeds + first / self._multiplier  # the language model multiplies its input
        return mx.stack([embeds, *by_layer.values()])
