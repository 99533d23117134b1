"""The interface between the runner and a family of vision models. `qwen2_5_vl` implements it.

Each of `shared.models.folder.VISION_FAMILIES` is a module of this package with a `load` function.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeAlias

import mlx.core as mx
import numpy as np

from worker.runner.vision.images import Grid, ImageMedia, PlacedImage

Floats: TypeAlias = "np.ndarray[Any, np.dtype[np.float32]]"


class Encoder(Protocol):
    """Computes image features: the embeddings that the language model uses for image tokens.

    Attributes:
        tower: the MLX module that holds the weights.
        parameters: number of weights.
        nbytes: bytes of the weights.
        blocks: number of transformer blocks, each a stage of `stages`.
    """

    tower: Any

    @property
    def parameters(self) -> int: ...  # noqa: D102

    @property
    def nbytes(self) -> int: ...  # noqa: D102

    @property
    def blocks(self) -> int: ...  # noqa: D102

    def grid(self, width: int, height: int) -> Grid:
        """Return the grid of patches for an image of this size in pixels. Any thread may call this.

        Raises:
            ValueError: the model does not support the aspect ratio.
        """
        ...

    def pixels(self, image: PlacedImage) -> Floats:
        """Decode and resize an image. Any thread may call this.

        Returns:
            [patches, values] input of the encoder.

        Raises:
            ValueError: the size of the image differs from the size in the request.
            Exception: the file is broken. Image decoders raise any type of exception.
        """
        ...

    def stages(self, pixels: Floats, grid: Grid) -> Iterator[mx.array]:
        """Encode an image lazily, one block per stage. Evaluate a result to compute it.

        Yields:
            The hidden state after each block; after the last block, the features [tokens, hidden size].
        """
        ...

    def seconds(self, grid: Grid) -> float:
        """Return the seconds that an image takes on an otherwise idle device, by the measured cost."""
        ...

    def bytes(self, grid: Grid) -> int:
        """Return the approximate peak bytes for encoding an image, without the weights."""
        ...

    def warming(self) -> Iterator[None]:
        """Encode images of two sizes, to compile every kernel and measure the cost. Yields after each image."""
        ...


class VisionFamily(Protocol):
    """A family of vision models.

    The language model has the call signature of mlx-lm's models (tokens and cache in, logits out). For rows with images
    it also takes the arguments `media` and `shifts` (`worker.runner.forward`).

    Attributes:
        image_token: placeholder token for an image in a tokenised prompt.
        encoder: the image encoder of the model.
    """

    image_token: int
    encoder: Encoder

    def expand(self, tokens: Sequence[int], images: Sequence[PlacedImage]) -> tuple[list[int], ImageMedia]:
        """Replace each placeholder with the tokens of its image, and compute the positions of all tokens.

        Args:
            tokens: token ids, with one `image_token` for each image, in order.
            images: the images, without `start`.

        Returns:
            The token ids and the media of the prompt.
        """
        ...
