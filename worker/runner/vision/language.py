"""The language half of a vision model: mlx-lm's model, with image features in place of the embeddings of image tokens.

mlx-vlm's own language models keep the positions of the last prompt in the model, so they serve only one prompt at a
time. mlx-lm's models have the same weights, and all that is known about batching them holds here as well.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Final, cast

import mlx.core as mx
from mlx import nn
from mlx_lm.models.cache import make_prompt_cache

from worker.models.load import TOKEN_EMBEDDINGS
from worker.runner.base import IMAGE_TOKENS
from worker.runner.forward import PlacedMedia
from worker.runner.vision.images import ImageMedia, PlacedImage

_INPUT_EMBEDDINGS: Final = "input_embeddings"


class PassInputs:
    """What layers read during a pass over rows with images, in addition to their arguments.

    Attributes:
        media: media by row; empty if all tokens are text.
        shifts: [rows] see `worker.runner.base.Media.shift`; None: 0 for all rows.
        added: by layer, [rows, length, hidden size] to add to its output.
        rotations: sines and cosines by the rotation that uses them (`worker.runner.vision.mrope`).
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """End the pass."""
        self.media: Sequence[PlacedMedia | None] = ()
        self.shifts: mx.array | None = None
        self.added: list[mx.array] = []
        self.rotations: dict[Any, tuple[mx.array, mx.array]] = {}

    @contextmanager
    def of_pass(
        self, media: Sequence[PlacedMedia | None], shifts: mx.array | None, added: list[mx.array]
    ) -> Iterator[None]:
        """Hold the inputs of a pass while its graph is built."""
        self.media, self.shifts, self.added = media, shifts, added
        try:
            yield
        finally:
            self.clear()


class ImageLanguageModel(nn.Module):  # type: ignore[misc,name-defined]  # MLX has no types for it
    """A language model that also reads image tokens.

    Args:
        language: mlx-lm's model.
        image_token: the token id that the vocabulary has for image tokens.
        inputs: read by those layers of `language` that depend on images.

    Attributes:
        encode: encodes an image; used if its features are missing during the prefill.
    """

    encode: Callable[[PlacedImage], mx.array]

    def __init__(self, language: Any, image_token: int, inputs: PassInputs | None = None) -> None:
        super().__init__()
        self.language = language
        self.image_token = image_token
        self.inputs = inputs or PassInputs()
        self._embedding = _Embedding(language)

    @property
    def layers(self) -> list[Any]:
        """The transformer layers, as `mlx_lm.models.cache.make_prompt_cache` expects them."""
        return cast("list[Any]", self.language.layers)

    @property
    def args(self) -> Any:
        """The model's configuration."""
        return self.language.args

    @property
    def quant_predicate(self) -> Any:
        """See `worker.models.load.convert`."""
        return getattr(self.language, "quant_predicate", None)

    @property
    def cast_predicate(self) -> Any:
        """See `worker.models.load.convert`."""
        return getattr(self.language, "cast_predicate", None)

    def make_cache(self) -> list[Any]:
        """Return mlx-lm's caches of a single sequence, one per layer."""
        return list(make_prompt_cache(self.language))

    def embed(self, tokens: mx.array) -> mx.array:
        """Return the embeddings of text tokens, as `language` takes them."""
        embeds: mx.array = self._embedding.module(tokens)
        return embeds

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
        arguments: dict[str, Any] = {}
        added: list[mx.array] = []
        if media:
            arguments, added = self._image_arguments(tokens, media)
        with self.inputs.of_pass(media, shifts, added), self._embedding.arguments(arguments) as accepted:
            logits: mx.array = self.language(tokens, cache=cache, **accepted)
        return logits

    def _image_arguments(
        self, tokens: mx.array, media: Sequence[PlacedMedia | None]
    ) -> tuple[dict[str, Any], list[mx.array]]:
        """Return the arguments of `language` for rows with images, and what its layers add to their outputs."""
        embeds = self.embed(mx.where(tokens < IMAGE_TOKENS, tokens, self.image_token))
        added: list[mx.array] = []
        for row, each in enumerate(media):
            for start, stop, features in self._placed_features(each, tokens.shape[1]):
                embeds[row, start:stop] = features[0].astype(embeds.dtype)
                added = added or [mx.zeros_like(embeds) for _ in features[1:]]
                for layer, more in zip(added, features[1:], strict=True):
                    layer[row, start:stop] = more.astype(embeds.dtype)
        return {"input_embeddings": embeds}, added

    def _placed_features(self, placed: PlacedMedia | None, length: int) -> Iterator[tuple[int, int, mx.array]]:
        """Yield the start and stop of each image in a pass of a row, and the features of the tokens in between."""
        if placed is None:
            return
        for image in placed.media.images:
            start, stop = max(image.start, placed.start), min(image.stop, placed.start + length)
            if start < stop:
                features = self._features(placed.media, image)[:, start - image.start : stop - image.start]
                yield start - placed.start, stop - placed.start, features

    def _features(self, media: ImageMedia, image: PlacedImage) -> mx.array:
        if (features := media.features.get(image.digest)) is None:
            features = media.features[image.digest] = self.encode(image)
        return features


class _Embedding:
    """The input embedding of a language model. The module may be replaced later, for example by a quantised one."""

    def __init__(self, language: Any) -> None:
        paths = [path.rpartition(".") for path, _ in language.named_modules()]
        parent_path, _, self._name = next(path for path in paths if path[2] in TOKEN_EMBEDDINGS)
        self._parent = language
        for part in filter(None, parent_path.split(".")):
            self._parent = self._parent[part]
        self._is_argument = _INPUT_EMBEDDINGS in inspect.signature(type(language).__call__).parameters

    @property
    def module(self) -> Any:
        """The module."""
        return self._parent[self._name]

    @contextmanager
    def arguments(self, arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield arguments that the language model takes.

        If it does not take embeddings, its own embedding returns them while the graph of the pass is built.
        """
        if self._is_argument or _INPUT_EMBEDDINGS not in arguments:
            yield arguments
            return
        module = self.module
        self._parent[self._name] = _GivenEmbeddings(module, arguments[_INPUT_EMBEDDINGS])
        try:
            yield {name: value for name, value in arguments.items() if name != _INPUT_EMBEDDINGS}
        finally:
            self._parent[self._name] = module


class _GivenEmbeddings:
    """Takes the place of an embedding, and returns given embeddings. Output layers may share its weights."""

    def __init__(self, module: Any, embeddings: mx.array) -> None:
        self._embeddings = embeddings
        self.as_linear = getattr(module, "as_linear", None)

    def __call__(self, _tokens: mx.array) -> mx.array:
        return self._embeddings


def add_image_features(layers: Sequence[Any], inputs: PassInputs) -> None:
    """Let layers add what an image has for them to their outputs (DeepStack)."""
    for number, layer in enumerate(layers):
        change_output(layer, partial(_plus_features, inputs, number))


def _plus_features(inputs: PassInputs, number: int, output: Any) -> Any:
    return output + inputs.added[number] if inputs.added else output


def change_output(layer: Any, change: Callable[[Any], Any]) -> None:
    """Replace each output of a layer with `change(output)`.

    The layer's class is replaced by a subclass, so the names of its weights stay as they are.
    """
    plain = type(layer)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return change(plain.__call__(self, *args, **kwargs))

    layer.__class__ = type(plain.__qualname__, (plain,), {"__call__": call, "__module__": plain.__module__})
