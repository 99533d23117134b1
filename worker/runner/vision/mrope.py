"""The language model of the Qwen-VL family with the call signature of mlx-lm's models.

mlx-vlm's own call keeps the positions of the last prompt in the model, so it serves only one prompt at a time. Here
each row has its own positions. During the prefill they come from its images. After it, a position is the token's index
in the cache plus the shift that the images cause.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import mlx.core as mx
from mlx import nn

from worker.runner.base import IMAGE_TOKENS
from worker.runner.forward import PlacedMedia
from worker.runner.vision.images import ImageMedia, PlacedImage


class MRopeModel(nn.Module):  # type: ignore[misc,name-defined]  # MLX has no types for it
    """A language model with three-dimensional positions (M-RoPE).

    Args:
        language: mlx-vlm's `LanguageModel` of Qwen2-VL or Qwen2.5-VL.
        image_token: the token id that the vocabulary has for image tokens.
        encode: encodes an image; used if its features are missing during the prefill.
    """

    def __init__(self, language: Any, image_token: int, encode: Callable[[PlacedImage], mx.array]) -> None:
        super().__init__()
        self.language = language
        self.image_token = image_token
        self._encode = encode

    @property
    def layers(self) -> list[Any]:
        """The transformer layers, as `mlx_lm.models.cache.make_prompt_cache` expects them."""
        return cast("list[Any]", self.language.layers)

    def __call__(
        self,
        tokens: mx.array,
        cache: list[Any],
        media: Sequence[PlacedMedia | None] = (),
        shifts: mx.array | None = None,
    ) -> mx.array:
        """Run a forward pass.

        Args:
            tokens: [rows, length] token ids.
            media: media by row; empty if all tokens are text.
            shifts: [rows] see `Media.shift`; None: 0 for all rows.

        Returns:
            [rows, length, vocabulary] logits.
        """
        positions = self._positions(cache, tokens.shape, media, shifts)
        embeds = self._embedded(tokens, media) if media else None
        # When embeddings are given, mlx-vlm uses only the shape of the tokens.
        output = self.language(tokens, inputs_embeds=embeds, cache=cache, position_ids=positions)
        return cast("mx.array", output.logits)

    def _positions(
        self,
        cache: list[Any],
        shape: Sequence[int],
        media: Sequence[PlacedMedia | None],
        shifts: mx.array | None,
    ) -> mx.array:
        """Return the positions [3, rows, length] of the tokens."""
        rows, length = shape
        offsets = mx.broadcast_to(mx.array(cache[0].offset), (rows,))
        if shifts is not None:
            offsets = offsets + shifts
        text = mx.broadcast_to(offsets[:, None] + mx.arange(length), (3, rows, length))
        if not media:
            return text
        return mx.concatenate(
            [
                text[:, row : row + 1] if each is None else mx.array(each.media.at(each.start, length))[:, None]
                for row, each in enumerate(media)
            ],
            axis=1,
        )

    def _embedded(self, tokens: mx.array, media: Sequence[PlacedMedia | None]) -> mx.array:
        """Return embeddings [rows, length, hidden size], with image features for the image tokens."""
        text = mx.where(tokens < IMAGE_TOKENS, tokens, self.image_token)
        embeds: mx.array = self.language.model.embed_tokens(text)
        for row, placed in enumerate(media):
            if placed is None:
                continue
            for image in placed.media.images:
                start, stop = max(image.start, placed.start), min(image.stop, placed.start + tokens.shape[1])
                if start < stop:
                    features = self._features(placed.media, image)[start - image.start : stop - image.start]
                    embeds[row, start - placed.start : stop - placed.start] = features.astype(embeds.dtype)
        return embeds

    def _features(self, media: ImageMedia, image: PlacedImage) -> mx.array:
        if (features := media.features.get(image.digest)) is None:
            features = media.features[image.digest] = self._encode(image)
        return features
