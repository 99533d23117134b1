"""An image encoder for any of mlx-vlm's models, through its `get_input_embeddings`.

An image is encoded on its own: the model gets the tokens that its processor writes for the image, and nothing else. The
result has an embedding for each of these tokens, also for those that separate rows or tiles of the image.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from operator import itemgetter
from threading import Lock
from typing import Any, Final

import mlx.core as mx
import numpy as np
from PIL import Image

from shared.models.image_geometry import ImageGeometry, check_aspect_ratio
from worker.models.load import first_line
from worker.runner.vision.images import Grid, PlacedImage, decode_image
from worker.runner.vision.language import ImageLanguageModel, change_output

PATCH_VALUES: Final = 3 * 14 * 14
"""Values of a pixel array that count as one patch. Every model has patches of about this size."""

_LAYOUTS: Final = 256
"""Number of image sizes for which the tokens are kept."""
_TEXT: Final = ("input_ids", "attention_mask", "labels", "num_image_tokens", "num_patches_list")
"""What a processor returns for the text, or only for itself."""
_MAX_PATCH_SIDE: Final = 32
"""Maximum side length of a patch in pixels. Larger arrays are whole images or tiles."""
_UNUSED: Final = ("audio_tower", "embed_audio", "sound_encoder", "sound_projection")
"""Parts of models that are not for images."""
_GRID: Final = "image_grid_thw"
_PIXELS: Final = ("pixel_values", "images")
"""Names under which processors return the pixels."""

Inputs = Mapping[str, Any]
"""Arguments of `get_input_embeddings` by name, as a processor returns them."""


@dataclass(frozen=True, slots=True)
class TokenLayout:
    """The layout of an image as its processor writes it; see `worker.runner.vision.images.Layout`.

    Attributes:
        ids: token ids: the model's image token, and tokens that separate rows or tiles.
        tiles: number of parts that the encoder sees separately.
        grid: see `Layout.grid`.
    """

    ids: tuple[int, ...] = field(repr=False)
    patches: int
    tiles: int
    grid: Grid | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens, the input of the language model."""
        return len(self.ids)


class GenericEncoder:
    """See `worker.runner.vision.half.Encoder`.

    The graph of an image is built at once. Its stages are outputs of the model's layers, which are computed when they
    are evaluated, so decoding rows need not wait for the whole image.

    Args:
        model: mlx-vlm's model. Its language model is replaced with the embeddings of `language`.
        processor: mlx-vlm's processor.
        language: the language model, for the embeddings of text.
        placeholder: the text that the processor replaces with the tokens of an image.

    Attributes:
        warm_sides: side lengths, in pixels, of the images that are encoded to measure the cost.
    """

    geometry: ImageGeometry | None = None
    warm_sides: tuple[int, int] = (224, 448)

    def __init__(self, model: Any, processor: Any, language: ImageLanguageModel, placeholder: str) -> None:
        model.language_model = TextEmbeddings(language.embed)
        for name in _UNUSED:
            if hasattr(model, name):
                setattr(model, name, None)
        self.tower = model
        layers = self._paced_layers()
        self.blocks = max(len(layers), 1)
        self._outputs: list[mx.array] | None = None  # of layers, while a graph is built
        for layer in layers:
            change_output(layer, self._keep_output)
        self._lock = Lock()  # tokenizers fail if threads use them at once
        self._processor = processor
        self._placeholder = placeholder
        self._cost = (0.0, 1.0)  # seconds per image and per patch
        self._extra_bytes = 0  # peak bytes of an image beyond what its patches need, such as for interpolated positions
        self._layout = lru_cache(_LAYOUTS)(self._compute_layout)

    def layout(self, width: int, height: int) -> TokenLayout:
        """See `Encoder.layout`. Runs the processor on a blank image of this size if it is the first one."""
        return self._layout(width, height)

    def pixels(self, image: PlacedImage) -> Inputs:
        """See `Encoder.pixels`."""
        layout, inputs = self._processed(decode_image(image.data, image.pixels))
        if layout != image.layout:
            raise ValueError(f"the size of image {image.digest[:12]} differs from the size in the request")
        return inputs

    def stages(self, pixels: Inputs, layout: Any) -> Iterator[mx.array]:
        """See `Encoder.stages`."""
        outputs, features = self._graph(pixels, layout)
        ends = (number * len(outputs) // self.blocks for number in range(1, self.blocks))
        waiting = deque(outputs[end - 1] if end else features for end in ends)  # dropped one after another
        return chain((waiting.popleft() for _ in range(self.blocks - 1)), [features])

    def encode(self, image: PlacedImage) -> mx.array:
        """See `Encoder.encode`."""
        *_, features = self.stages(self.pixels(image), image.layout)
        return features

    def warming(self) -> Iterator[None]:
        """See `Encoder.warming`."""
        small, large = ((side, side) for side in self.warm_sides)
        seconds: dict[tuple[int, int], list[float]] = {small: [], large: []}
        for size in (small, large) * 2:
            seconds[size].append(self._timed(*size))
            yield
        small_s, large_s = (min(seconds[size]) for size in (small, large))
        first = self.layout(*small).patches
        more = max(self.layout(*large).patches - first, 1)
        per_patch = max(large_s - small_s, large_s / 100) / max(more, first)
        self._cost = (max(small_s - first * per_patch, 0.0), per_patch)

    def seconds(self, layout: Any) -> float:
        """See `Encoder.seconds`."""
        per_image, per_patch = self._cost
        return per_image + int(layout.patches) * per_patch

    def bytes(self, layout: Any) -> int:
        """See `Encoder.bytes`."""
        return self._extra_bytes + self._patch_bytes(layout)

    def _patch_bytes(self, layout: Any) -> int:
        hidden, intermediate, heads = _sizes(self.tower.config.vision_config)
        # On a CPU, attention stores the whole score matrix twice. GPU kernels do not store it.
        scores = 2 * heads * -(-layout.patches // layout.tiles) if mx.default_device() == mx.cpu else 0
        return int(layout.patches * (6 * PATCH_VALUES + 4 * (hidden + intermediate) + scores) * 4)

    def _keep_output(self, output: Any) -> Any:
        """Keep the output of a layer while a graph is built; return it unchanged."""
        if self._outputs is not None:
            self._outputs.append(output[0] if isinstance(output, tuple | list) else output)
        return output

    def _paced_layers(self) -> Sequence[Any]:
        """Return the layers whose outputs are the stages."""
        return _longest_stack(self.tower)

    def _graph(self, pixels: Inputs, layout: TokenLayout) -> tuple[list[mx.array], mx.array]:
        """Build the graph of an image. Returns the outputs of the layers and the features, unevaluated."""
        outputs: list[mx.array] = []
        self._outputs = outputs
        try:
            features = self._features(pixels, layout)
        except (IndexError, KeyError, TypeError) as error:  # not for the device's errors, which are of other types
            raise ValueError(f"mlx-vlm cannot encode this image: {first_line(error)}") from error
        finally:
            self._outputs = None
        return outputs, features

    def _features(self, pixels: Inputs, layout: TokenLayout) -> mx.array:
        inputs = {name: _as_array(value) for name, value in pixels.items()}
        ids = mx.array([layout.ids])
        values = next(inputs.pop(name) for name in _PIXELS if name in inputs)
        return self._packed(self.tower.get_input_embeddings(ids, values, mask=mx.ones_like(ids), **inputs))

    def _packed(self, found: Any) -> mx.array:
        """Return the features [layers, tokens, hidden size] in what `get_input_embeddings` returned."""
        embeds: mx.array = found.inputs_embeds
        return embeds

    def _timed(self, width: int, height: int) -> float:
        layout, inputs = self._processed(Image.new("RGB", (width, height)))
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        start = time.perf_counter()
        mx.eval([*self.stages(inputs, layout)])
        seconds = time.perf_counter() - start
        self._extra_bytes = max(self._extra_bytes, mx.get_peak_memory() - before - self._patch_bytes(layout))
        return seconds

    def _compute_layout(self, width: int, height: int) -> TokenLayout:
        check_aspect_ratio(width, height)
        try:
            layout, _ = self._processed(Image.new("RGB", (width, height)))
        except Exception as error:  # processors raise any exception for sizes that they do not expect
            raise ValueError(f"an image of {width} x {height} pixels cannot be read: {first_line(error)}") from error
        if not layout.tokens:
            raise ValueError(f"an image of {width} x {height} pixels is too small")
        return layout

    def _processed(self, image: Image.Image) -> tuple[TokenLayout, Inputs]:
        """Run the processor on an image, and on its placeholder as the text."""
        # Some processors compute with MLX, and this may not be the thread that uses the device.
        with self._lock, mx.stream(mx.cpu):
            ids, found = self._read(image)
            inputs = {name: _on_host(value) for name, value in found.items() if name not in _TEXT}
        values = next(inputs[name] for name in _PIXELS if name in inputs)
        arrays = values if isinstance(values, list) else [values]
        patches = sum(int(array.size) for array in arrays) // PATCH_VALUES + 1
        return TokenLayout(ids, patches, _tiles(arrays), self._grid(inputs)), inputs

    def _read(self, image: Image.Image) -> tuple[tuple[int, ...], Inputs]:
        """Return the token ids of an image, and its pixels with what else the encoder needs."""
        found = dict(self._processor(images=[image], text=[self._placeholder]))
        return self._image_ids(np.array(found["input_ids"])[0].tolist()), found

    def _grid(self, inputs: Inputs) -> Grid | None:
        if _GRID not in inputs:
            return None
        ((_, rows, columns),) = np.array(inputs[_GRID]).tolist()
        return Grid(rows, columns, self._processor.image_processor.merge_size)

    def _image_ids(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Return the token ids of an image.

        The tokenizer adds tokens for the beginning of a text, and some processors add line breaks around an image. The
        chat template has those (`worker.models.image_templates`), where they may merge with others.
        """
        tokenizer = self._processor.tokenizer
        around = frozenset(tokenizer("").input_ids)
        own = [i for i, token in enumerate(ids) if token not in around and tokenizer.decode([token]).strip()]
        return tuple(ids[own[0] : own[-1] + 1]) if own else ()


def _longest_stack(model: Any) -> list[Any]:
    """Return the layers of the longest list of modules of one type: the transformer of an image encoder."""
    stacks: dict[tuple[str, type], list[tuple[int, Any]]] = {}
    for path, module in model.named_modules():
        parent, _, name = path.rpartition(".")
        if name.isdecimal():
            stacks.setdefault((parent, type(module)), []).append((int(name), module))
    longest = max(stacks.values(), key=len, default=[])
    return [module for _, module in sorted(longest, key=itemgetter(0))]


class TextEmbeddings:
    """Stands in for mlx-vlm's language model, of which `get_input_embeddings` needs only the embeddings of tokens.

    Args:
        embed: returns the embeddings that the language model takes.
    """

    embed_scale = 1.0
    hidden_size_per_layer_input = 0

    def __init__(self, embed: Callable[[mx.array], mx.array]) -> None:
        self.model = self
        self.embed_tokens = self.get_input_embeddings = embed

    def get_rope_index(self, *_arguments: Any, **_more: Any) -> tuple[None, None]:
        """Compute no positions: those of a single image say nothing about a prompt."""
        return None, None


def _on_host(value: Any) -> Any:
    """Copy arrays of MLX, which would count as the device's memory while an image waits."""
    return np.array(value) if isinstance(value, mx.array) else value


def _as_array(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return mx.array(value)
    return [_as_array(each) for each in value] if isinstance(value, list) else value


def _tiles(arrays: Sequence[Any]) -> int:
    """Return the number of tiles in pixel arrays.

    Their shapes are [1, tiles, channels, height, width], [tiles, channels, height, width], [tiles, patches, values], or
    [patches, channels, height, width] of one image.
    """
    return max(1, sum(_leading(array.shape) for array in arrays))


def _leading(shape: Sequence[int]) -> int:
    if len(shape) == 5:
        return int(shape[1])
    return 1 if len(shape) == 4 and shape[-1] <= _MAX_PATCH_SIDE else int(shape[0])


def _sizes(config: Any) -> tuple[int, int, int]:
    """Return the hidden size, the intermediate size and the heads of an encoder."""
    hidden = getattr(config, "hidden_size", None) or getattr(config, "embed_dim", None) or 1024
    heads = getattr(config, "num_attention_heads", None) or getattr(config, "num_heads", None) or 16
    return int(hidden), int(getattr(config, "intermediate_size", None) or 4 * hidden), int(heads)
