"""Request from text and images with mlx-vlm's models: the backend of vision models of the Qwen-VL family.

Rows are batched, read, decoded and kept as those of language models are (`worker.runner.model_runner`), text and images
in one batch: what differs is where a prompt's vectors come from and how its positions are counted. A row with images
goes through `worker.runner.vision.stage` first, unless its images are in the prefix that it shares with an earlier row.

mlx-vlm's own `BatchGenerator` takes the sampling of a batch from its first request, admits only when a whole group of
slots is free, and computes log-probabilities for every row; this one does none of that.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import mlx.core as mx
from mlx_lm import tokenizer_utils
from mlx_lm.utils import maybe_set_recommended_wired_limit
from mlx_vlm import utils
from mlx_vlm.models.base import load_chat_template

from shared.errors import JobFailure
from shared.jobs.request import Request
from shared.models.catalog import CatalogModel
from shared.models.folder import ModelError, check_folder
from shared.settings import Settings
from worker.models.load import NO_CODE, LoadedModel, convert, first_line, loaded_as
from worker.runner.base import IMAGE_TOKENS, Detokenizer, Media, PromptError, Row
from worker.runner.memory import UNLIMITED, Memory
from worker.runner.model_runner import TextBackend, TextDetokenizer, assembled, read_weights
from worker.runner.prefill import Chunk
from worker.runner.spill import Spill
from worker.runner.vision.images import ImageMedia, place
from worker.runner.vision.mrope import MRopeModel
from worker.runner.vision.qwen_encoder import ImageEncoder
from worker.runner.vision.stage import Encoding

FAMILIES = ("qwen2_5_vl",)
"""What config.json calls models whose encoder and positions are known here."""

SHARE_OF_FEATURES = 16
"""The part of the memory for caches that the encoder's results may take."""
MOST_FEATURES = 2**30
"""Bytes of them at most: some hundred screenshots of a large model."""

_MISCOUNTED: Final = (
    "The text of a message contains the token that stands for an image, or the template leaves one out."
)


def load(
    settings: Settings, model: CatalogModel, clock: Callable[[], float] = time.monotonic
) -> Generator[float, None, VisionBackend]:
    """Load and warm a model, in pieces; each tells how far it is.

    Raises:
        ModelError: it cannot be served.
    """
    if settings.wired_limit:
        maybe_set_recommended_wired_limit()
    if model.adapter is not None:
        raise ModelError(f"{model.path}: adapters are for text models")
    loaded, encoder = load_vision_model(model.path, lazy=True)
    convert(loaded, model.dtype, model.quantize_bits)
    if model.dtype is not None:
        encoder.tower.set_dtype(getattr(mx, model.dtype))
    yield from read_weights(loaded.model, model.path)
    yield from read_weights(encoder.tower, model.path)
    return (yield from assembled(settings, loaded, model, partial(VisionBackend, encoder, clock=clock)))


def load_vision_model(folder: Path, *, lazy: bool = False) -> tuple[LoadedModel, ImageEncoder]:
    """Load a model folder: its language model with the tokenizer, and its image encoder.

    Raises:
        ModelError: something in it is missing or cannot be used.
    """
    check_folder(folder)
    folder = folder.resolve()  # a relative one looks like a hub id to the libraries
    try:
        config = utils.load_config(folder)
        family = config.get("model_type")
        if family not in FAMILIES:
            raise ModelError(f"{folder} is of a kind ({family}) whose images are not understood here")
        model: Any = utils.load_model(folder, lazy=lazy)
        tokenizer = tokenizer_utils.load(folder, NO_CODE, eos_token_ids=config.get("eos_token_id"))
        load_chat_template(tokenizer, folder)  # type: ignore[no-untyped-call]
        processing = importlib.import_module(f"mlx_vlm.models.{family}.processing_{family}")
        processor = processing.Qwen2_5_VLProcessor.from_pretrained(str(folder), **NO_CODE)
    except ModelError:
        raise
    except Exception as error:  # a broken folder makes the libraries raise anything
        raise ModelError(f"The model in {folder} cannot be loaded: {first_line(error)}") from error
    encoder = ImageEncoder(model.vision_tower, processor.image_processor)
    language = MRopeModel(model.language_model, int(model.config.image_token_id), encoder.encode)
    loaded = loaded_as("vision", folder, language, tokenizer, config)
    return replace(loaded, card=replace(loaded.card, image=asdict(encoder.geometry))), encoder


class VisionBackend(TextBackend):
    """See `worker.runner.base.Backend`."""

    def __init__(
        self,
        encoder: ImageEncoder,
        loaded: LoadedModel,
        chunk: int,
        memory: Memory = UNLIMITED,
        spill: Spill | None = None,
        **options: Any,
    ) -> None:
        cache_bytes = _for_features(memory.most_bytes)
        super().__init__(loaded, chunk, replace(memory, most_bytes=memory.most_bytes - cache_bytes), spill, **options)
        self.about |= {"mlx_vlm": version("mlx-vlm"), "encoder_parameters": encoder.parameters}
        self._encoder_of_images = encoder
        self.weights_bytes += encoder.nbytes
        self._image_token = loaded.model.image_token
        self._encoding = Encoding(encoder, self._pace, cache_bytes)
        self._images_next = False
        self._unencoded: dict[int, ImageMedia] = {}  # of the rows inserted

    def detokenizer(self) -> Detokenizer:
        """mlx-lm's, but a space that the text begins with stays, as in what mlx-vlm says."""
        inner = self._tokenizer.detokenizer
        if hasattr(inner, "_maybe_trim_space"):
            inner._maybe_trim_space = str  # noqa: SLF001 - there is no option for it
        return TextDetokenizer(inner)

    def grant(self, most_bytes: int, hoped_bytes: int = 0) -> None:
        """The encoder's results give way, too."""
        cache_bytes = _for_features(most_bytes)
        self._encoding.allow(cache_bytes)
        super().grant(most_bytes - cache_bytes, hoped_bytes - _for_features(hoped_bytes))

    def warming(self) -> Iterator[None]:
        """Also encode images."""
        yield from self._encoder_of_images.warming()
        yield from super().warming()

    def remove(self, uids: Iterable[int]) -> None:
        """Drop rows."""
        gone = frozenset(uids)
        self._encoding.remove(gone)
        super().remove(gone)

    def reset(self) -> None:
        """Drop every row and all that was kept."""
        self._encoding.clear()
        super().reset()

    def stats(self) -> dict[str, float]:
        """Those of text, and of images."""
        return super().stats() | self._encoding.stats()

    def close(self) -> None:
        """End."""
        self._encoding.close()
        super().close()

    @property
    def _reading(self) -> bool:
        return super()._reading or len(self._encoding) > 0

    def insert(self, rows: Sequence[Row]) -> None:
        """Add rows; while images are encoded, prefixes give way to what that takes."""
        self._unencoded |= {row.uid: row.media for row in rows if isinstance(row.media, ImageMedia)}
        super().insert(rows)

    def _begin(self, row: Row) -> None:
        if not self._encoding.add(row, self._prefixes.length(row.owner, row.prompt[:-1])):
            self._begin_reading(row)

    def _begin_reading(self, row: Row) -> None:
        self._unencoded.pop(row.uid, None)
        super()._begin(row)

    def _forget(self, uids: Iterable[int]) -> None:
        gone = list(uids)
        for uid in gone:
            self._unencoded.pop(uid, None)
        super()._forget(gone)

    def _passing(self, media: Media | None = None) -> int:
        """The encoder's memory for the largest image: they are encoded one after another."""
        shown = [*self._unencoded.values(), *([media] if isinstance(media, ImageMedia) else [])]
        grids = {image.grid for each in shown for image in each.images}
        return max(map(self._encoder_of_images.bytes, grids), default=0)

    def _read_on(self, *, decoding: bool) -> Chunk:
        """Encode and read in turns, so that neither text nor images wait for more than a piece of the other."""
        self._images_next = not self._images_next
        chunk = self._encoding.advance(decoding) if self._images_next or not super()._reading else None
        for row in self._encoding.ready():
            self._begin_reading(row)
        return chunk or super()._read_on(decoding=decoding)

    def _chat(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Templates know images by the type of their part alone."""
        return super()._chat([{**message, "content": _parts(message["content"])} for message in messages])

    def _with_images(
        self, tokens: list[int], generation: Request, images: Mapping[str, bytes]
    ) -> tuple[list[int], Media | None]:
        asked = generation.image_parts
        if tokens.count(self._image_token) != len(asked):
            raise PromptError(JobFailure.TEMPLATE, _MISCOUNTED)
        if not asked:
            return tokens, None
        try:
            grids = [self._encoder_of_images.grid(part["width"], part["height"]) for part in asked]
        except ValueError as error:
            raise PromptError(JobFailure.TEMPLATE, f"The model takes no image of such a shape: {error}") from error
        if (most := max(map(self._encoder_of_images.bytes, grids))) > self._budget.widest_bytes:
            detail = f"An image takes {most / 2**30:.1f} GiB to be encoded; send a smaller one."
            raise PromptError(JobFailure.MEMORY, detail)
        found = [(part["image"], grid, images[part["image"]]) for part, grid in zip(asked, grids, strict=True)]
        expanded, media = place(tokens, self._image_token, found)
        if expanded[-1] >= IMAGE_TOKENS:
            raise PromptError(JobFailure.TEMPLATE, "The prompt ends with an image.")
        return expanded, media


def _for_features(most_bytes: int) -> int:
    """What the encoder's results may take of the memory for caches."""
    return min(most_bytes // SHARE_OF_FEATURES, MOST_FEATURES)


def _parts(content: Any) -> Any:
    if isinstance(content, str):
        return content
    return [{"type": "image"} if part["type"] == "image" else part for part in content]
