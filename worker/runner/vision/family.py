"""What the runner needs to know of a family of vision models. `qwen2_5_vl` is the first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeAlias

import mlx.core as mx
import numpy as np

from worker.runner.vision.images import Grid, ImageMedia, PlacedImage

Floats: TypeAlias = "np.ndarray[Any, np.dtype[np.float32]]"


class Encoder(Protocol):
    """Computes the vectors that the language model reads in place of an image's tokens.

    Attributes:
        tower: the module that has the weights.
        parameters: how many weights there are.
        nbytes: bytes of them.
        blocks: stages of an image.
    """

    tower: Any

    @property
    def parameters(self) -> int: ...  # noqa: D102

    @property
    def nbytes(self) -> int: ...  # noqa: D102

    @property
    def blocks(self) -> int: ...  # noqa: D102

    def grid(self, width: int, height: int) -> Grid:
        """How an image of that many pixels is cut. Any thread may ask.

        Raises:
            ValueError: the model takes no image of such a shape.
        """
        ...

    def pixels(self, image: PlacedImage) -> Floats:
        """[patches, values]: what the encoder takes. For any thread.

        Raises:
            ValueError: the file has another size than was announced.
            Exception: it is broken; decoders raise anything.
        """
        ...

    def stages(self, pixels: Floats, grid: Grid) -> Iterator[mx.array]:
        """Encode, a block at a time; nothing is computed before it is evaluated.

        Yields:
            What the blocks computed, and at last [tokens, hidden]: what the language model reads.
        """
        ...

    def seconds(self, grid: Grid) -> float:
        """What an image takes while nothing else runs, as measured."""
        ...

    def bytes(self, grid: Grid) -> int:
        """About what encoding an image takes of the memory beside the weights, at its widest."""
        ...

    def warming(self) -> Iterator[None]:
        """Encode images of two sizes, so that every kernel is compiled, and measure; in pieces."""
        ...


class VisionFamily(Protocol):
    """A family of vision models.

    The model that belongs to it is called as mlx-lm's models are (tokens and a cache in, logits out), with `media` and
    `shifts` beside the tokens (`worker.runner.forward`) where rows have images.

    Attributes:
        image_token: the token that stands for an image in a tokenised prompt.
    """

    image_token: int
    encoder: Encoder

    def place(self, tokens: Sequence[int], images: Sequence[tuple[str, Grid, bytes]]) -> tuple[list[int], ImageMedia]:
        """Replace each image token by the tokens of its image, and compute the positions of all tokens.

        Args:
            tokens: with one `image_token` for each image, in order.
            images: digest, grid and file of each.
        """
        ...
