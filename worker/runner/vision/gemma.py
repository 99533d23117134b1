"""Gemma 4: image features that the model does not scale, attention within an image, and inputs of each layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, TypeAlias

import mlx.core as mx
import numpy as np

from worker.runner.base import IMAGE_TOKENS
from worker.runner.column_cache import NO_SPAN, ColumnCache
from worker.runner.forward import PlacedMedia
from worker.runner.vision.generic_encoder import TokenLayout
from worker.runner.vision.language import ImageLanguageModel, PassInputs

Ints: TypeAlias = "np.ndarray[Any, np.dtype[np.int32]]"

_NO_TOKEN: Final = 0
"""The token whose layer inputs image features have."""


class Gemma4Language(ImageLanguageModel):
    """See `ImageLanguageModel`.

    Args:
        feature_token: the token id of an image feature in the layout of an image; other tokens there are like text.
        whole: whether the features of an image attend to each other.
    """

    def __init__(self, language: Any, image_token: int, inputs: PassInputs, feature_token: int, *, whole: bool) -> None:
        super().__init__(language, image_token, inputs)
        self._feature_token = feature_token
        self._whole = whole
        self._scale = float(self._body.embed_scale)

    def embed(self, tokens: mx.array) -> mx.array:
        """Return the scaled embeddings of text tokens: image features have no scale."""
        return super().embed(tokens) * self._scale

    def __call__(
        self,
        tokens: mx.array,
        cache: list[Any],
        media: Sequence[PlacedMedia | None] = (),
        shifts: mx.array | None = None,
    ) -> mx.array:
        """See `ImageLanguageModel.__call__`."""
        if not media:
            return super().__call__(tokens, cache, media, shifts)
        with self._scaled(), self._attending(cache, tokens.shape, media):
            return super().__call__(tokens, cache, media, shifts)

    @property
    def _body(self) -> Any:
        """The transformer without the output layer."""
        return getattr(self.language, "language_model", self.language).model

    @contextmanager
    def _scaled(self) -> Iterator[None]:
        """Keep the model from scaling embeddings while the graph of a pass is built."""
        self._body.embed_scale = 1.0
        try:
            yield
        finally:
            self._body.embed_scale = self._scale

    @contextmanager
    def _attending(
        self, cache: Sequence[Any], shape: Sequence[int], media: Sequence[PlacedMedia | None]
    ) -> Iterator[None]:
        """Let the features of an image attend to each other while the graph of a pass is built."""
        parts = [part for part in cache if isinstance(part, ColumnCache)] if self._whole else []
        spans = self._spans(shape, media) if parts else None
        for part in parts:
            part.spans = spans
        try:
            yield
        finally:
            for part in parts:
                part.spans = None

    def _spans(self, shape: Sequence[int], media: Sequence[PlacedMedia | None]) -> mx.array:
        """Return, by row and token of a pass, the number of the image to which a feature belongs."""
        spans = np.full(shape, NO_SPAN, dtype=np.int32)
        for number, (row, start, ids) in enumerate(_image_ids(shape[1], media)):
            spans[row, start : start + len(ids)] = np.where(ids == self._feature_token, number, NO_SPAN)
        return mx.array(spans)

    def _image_arguments(
        self, tokens: mx.array, media: Sequence[PlacedMedia | None]
    ) -> tuple[dict[str, Any], list[mx.array]]:
        arguments, added = super()._image_arguments(tokens, media)
        if self._body.hidden_size_per_layer_input:
            ids = self._layer_ids(tokens, media)
            arguments["per_layer_inputs"] = self._body._get_per_layer_inputs(ids)  # noqa: SLF001 - the only way
        return arguments, added

    def _layer_ids(self, tokens: mx.array, media: Sequence[PlacedMedia | None]) -> mx.array:
        """Return the tokens of a pass for the inputs of its layers."""
        layer_ids = mx.where(tokens < IMAGE_TOKENS, tokens, _NO_TOKEN)
        for row, start, ids in _image_ids(tokens.shape[1], media):
            own = np.where(ids == self._feature_token, _NO_TOKEN, ids)
            layer_ids[row, start : start + len(ids)] = mx.array(own).astype(layer_ids.dtype)
        return layer_ids


def _image_ids(length: int, media: Sequence[PlacedMedia | None]) -> Iterator[tuple[int, int, Ints]]:
    """Yield each image, or part of one, in a pass: its row, its first token in the pass, and the ids of its layout."""
    for row, placed in enumerate(media):
        if placed is None:
            continue
        for image in placed.media.images:
            start, stop = max(image.start, placed.start), min(image.stop, placed.start + length)
            layout = image.layout
            if start < stop and isinstance(layout, TokenLayout):
                ids = np.array(layout.ids[start - image.start : stop - image.start], dtype=np.int32)
                yield row, start - placed.start, ids
