"""The language model of the Qwen-VL family, called as mlx-lm's models are: tokens and a cache in, logits out.

mlx-vlm's own call keeps the positions of the last prompt inside the model, which serves one prompt at a time. Here
each row has its own: from its media while its prompt is read, and behind it from its place in the cache and the shift
that its images made.
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
    """A language model with positions of three axes (M-RoPE).

    Args:
        language: mlx-vlm's `LanguageModel` of Qwen2-VL or Qwen2.5-VL.
        image_token: the token that the vocabulary has for a piece of an image.
        encode: what the encoder makes of an image, for one whose features are not there when it is read.
    """

    def __init__(self, language: Any, image_token: int, encode: Callable[[PlacedImage], mx.array]) -> None:
        super().__init__()
        self.language = language
        self.image_token = image_token
        self._encode = encode

    @property
    def layers(self) -> list[Any]:
        """As mlx-lm's models have them, for `make_prompt_cache`."""
        return cast("list[Any]", self.language.layers)

    def __call__(
        self,
        tokens: mx.array,
        cache: list[Any],
        media: Sequence[PlacedMedia | None] = (),
        shifts: mx.array | None = None,
    ) -> mx.array:
        """Run it.

        Args:
            tokens: [rows, length].
            media: of each row what its image tokens stand for; none: all are text.
            shifts: [rows] what to add to the places of tokens behind the prompts; None: nothing.

        Returns:
            [rows, length, vocabulary] logits.
        """
        positions = self._positions(cache, tokens.shape, media, shifts)
        embeds = self._embedded(tokens, media) if media else None
        # With embeddings given, the tokens only tell the shape.
        out = self.language(tokens, inputs_embeds=embeds, cache=cache, position_ids=positions)
        return cast("mx.array", out.logits)

    def _positions(
        self,
        cache: list[Any],
        shape: Sequence[int],
        media: Sequence[PlacedMedia | None],
        shifts: mx.array | None,
    ) -> mx.array:
        """[3, rows, length] positions of the tokens."""
        rows, length = shape
        places = mx.broadcast_to(mx.array(cache[0].offset), (rows,))
        if shifts is not None:
            places = places + shifts
        behind = mx.broadcast_to(places[:, None] + mx.arange(length), (3, rows, length))
        if not media:
            return behind
        return mx.concatenate(
            [
                behind[:, row : row + 1] if each is None else mx.array(each.media.at(each.start, length))[:, None]
                for row, each in enumerate(media)
            ],
            axis=1,
        )

    def _embedded(self, tokens: mx.array, media: Sequence[PlacedMedia | None]) -> mx.array:
        """[rows, length, hidden] embeddings: of the text from the vocabulary, of images what the encoder made."""
        text = mx.where(tokens < IMAGE_TOKENS, tokens, self.image_token)
        embeds: mx.array = self.language.model.embed_tokens(text)
        for row, placed in enumerate(media):
            if placed is None:
                continue
            for image in placed.media.images:
                start, stop = max(image.start, placed.start), min(image.stop, placed.start + tokens.shape[1])
                if start < stop:
                    pieces = self._features(placed.media, image)[start - image.start : stop - image.start]
                    embeds[row, start - placed.start : stop - placed.start] = pieces.astype(embeds.dtype)
        return embeds

    def _features(self, media: ImageMedia, image: PlacedImage) -> mx.array:
        if (features := media.features.get(image.digest)) is None:
            features = media.features[image.digest] = self._encode(image)
        return features
