"""The image half of a vision model, as the runner uses it: `VisionHalf`, and the `Encoder` that it contains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import mlx.core as mx

from shared.models.image_geometry import ImageGeometry
from worker.runner.vision.images import ImageMedia, Layout, PlacedImage

Pixels: TypeAlias = Any
"""The input of an encoder for one image, in arrays of numpy. Only the encoder knows its structure."""

Expand: TypeAlias = Callable[[Sequence[int], Sequence[PlacedImage]], tuple[list[int], ImageMedia]]
"""Replaces the placeholder tokens of a prompt with the tokens of its images; see `images.expand`."""


class Encoder(Protocol):
    """Computes image features: the embeddings that the language model uses for image tokens.

    Attributes:
        tower: the MLX module that holds the weights.
        geometry: how images are resized; None: not by a rule that the API knows.
        blocks: number of stages of `stages`.
    """

    tower: Any
    geometry: ImageGeometry | None

    @property
    def blocks(self) -> int: ...  # noqa: D102

    def layout(self, width: int, height: int) -> Layout:
        """Return the tokens and patches of an image of this size in pixels. Any thread may call this.

        Raises:
            ValueError: the model does not support the aspect ratio.
        """
        ...

    def pixels(self, image: PlacedImage) -> Pixels:
        """Decode and resize an image. Any thread may call this.

        Raises:
            ValueError: the size of the image differs from the size in the request.
            Exception: the file is broken. Image decoders raise any type of exception.
        """
        ...

    def stages(self, pixels: Pixels, layout: Layout) -> Iterator[mx.array]:
        """Encode an image lazily, one block per stage. Evaluate a result to compute it.

        Yields:
            The hidden state after each block; after the last block, the features [layers, tokens, hidden size]: the
            embeddings, then what is added to the output of the language model's first layers, if anything.

        Raises:
            ValueError: the image cannot be encoded.
        """
        ...

    def encode(self, image: PlacedImage) -> mx.array:
        """Return the features of an image, unevaluated."""
        ...

    def seconds(self, layout: Layout) -> float:
        """Return the seconds that an image takes on an otherwise idle device, by the measured cost."""
        ...

    def bytes(self, layout: Layout) -> int:
        """Return the approximate peak bytes for encoding an image, without the weights."""
        ...

    def warming(self) -> Iterator[None]:
        """Encode images of two sizes, to compile every kernel and measure the cost. Yields after each image."""
        ...


@dataclass(frozen=True, slots=True)
class VisionHalf:
    """The image half of a loaded vision model.

    Attributes:
        image_token: placeholder token for an image in a tokenised prompt.
        encoder: the image encoder.
        expand: replaces the placeholder tokens.
    """

    image_token: int
    encoder: Encoder
    expand: Expand
