"""Text generation with mlx-lm: the backend of language models.

A row's way: `insert` checks it, `Arrivals` waits for what disk has of its prompt, `Prefill` puts the rest into a cache
chunk by chunk, `Lanes` takes it in and decodes it beside the others. Each `step` queues one chunk and one decode
step on the device, then reads the tokens of the step before.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
from jinja2 import TemplateError
from mlx.utils import tree_flatten
from mlx_lm.utils import get_total_parameters, maybe_set_recommended_wired_limit

from shared.errors import JobFailure
from shared.jobs.request import Request, Sampling
from shared.models.catalog import CatalogModel
from shared.models.folder import ModelError
from shared.settings import Settings
from worker.engine.prefill_budget import Pace
from worker.models.load import LoadedModel, convert, first_line, load_model
from worker.runner import kv_cache as kv
from worker.runner import kv_segments as pieces
from worker.runner import prefill_cost as cost
from worker.runner.base import IMAGE_TOKENS, Detokenizer, Fit, Media, Prompt, PromptError, Row, StepResult
from worker.runner.length_buckets import Lanes
from worker.runner.memory import SHARE_OF_PREFIXES, UNLIMITED, Budget, Footprint, Memory, device_limit, exhaustion_told
from worker.runner.prefill import Chunk, Prefill
from worker.runner.prefix_cache import PrefixCache, common_length
from worker.runner.prefix_fetch import Arrivals
from worker.runner.prefix_files import PrefixFiles, fingerprint
from worker.runner.speculation.verification import Speculation
from worker.runner.spill import Spill

T = TypeVar("T", bound="TextBackend")

CHUNK_CPU = 32
"""Prompt tokens between two decode steps, at most; beside rows that decode `Pace` makes it fewer, or only some layers.
A token costs a CPU a sixth more than in chunks of 64, beyond which it gets no cheaper."""
CHUNK_GPU = 512
"""A GPU is only busy with some hundreds of tokens at a time."""
PADDING_PRICE_CPU = 4
"""A CPU takes three to five times as long to attend to a byte of the cache as to multiply by one of the weights."""

SHARE_ON_THE_WAY = 8
"""The part of the memory for prefixes that those may take which are on their way to disk."""
CLOSE_S = 1.0
"""Time to write prefixes at the end; what is left over then is lost."""

PIECE_BYTES = 64 * 2**20
"""Of the weights, that are read between two steps of other models."""
READ_SHARE = 0.9
"""The part of the loading that is reading; the rest is warming up."""
_LEFT_A_PIECE = 0.95
"""Of what was left of the loading before a piece of warming up: how many there are depends on the model."""

_CLEAR_EVERY = 512
"""Steps between two returns of MLX's spare buffers, whose sizes fit the batch less and less as it changes."""


def load(
    settings: Settings, model: CatalogModel, clock: Callable[[], float] = time.monotonic
) -> Generator[float, None, TextBackend]:
    """Load and warm a model, in pieces; each tells how far it is.

    Args:
        clock: by which it will judge what its steps take.

    Raises:
        ModelError: it cannot be served.
    """
    if settings.wired_limit:
        maybe_set_recommended_wired_limit()
    loaded = load_model(model.path, adapter=model.adapter, lazy=True)
    convert(loaded, model.dtype, model.quantize_bits)
    yield from read_weights(loaded.model, model.path)
    return (yield from assembled(settings, loaded, model, partial(TextBackend, clock=clock)))


def read_weights(model: Any, folder: Path) -> Generator[float, None, None]:
    """Have the weights read, some tens of megabytes at a time: rows of other models decode in between.

    Raises:
        ModelError: they cannot be read.
    """
    arrays: list[mx.array] = list(dict(tree_flatten(model.parameters())).values())
    total = sum(array.nbytes for array in arrays)
    done = piece = 0
    waiting: list[mx.array] = []
    for array in arrays:
        waiting.append(array)
        piece += array.nbytes
        if piece >= PIECE_BYTES or array is arrays[-1]:
            try:
                mx.eval(waiting)
            except Exception as error:  # of a file that was cut, say
                raise ModelError(f"The weights in {folder} cannot be read: {first_line(error)}") from error
            done, piece, waiting = done + piece, 0, []
            yield READ_SHARE * done / max(total, 1)


def assembled(
    settings: Settings, loaded: LoadedModel, model: CatalogModel, kind: Callable[..., T]
) -> Generator[float, None, T]:
    """The backend of a model that was loaded, warm; in pieces, as `load`.

    Args:
        kind: makes it of the model, the chunk, the memory and the disk for prefixes.

    Raises:
        ModelError: it cannot be served.
    """
    if not kv.batchable(loaded.model):
        raise ModelError(f"{model.path} cannot be served: mlx-lm has no batch cache for its kind of model.")
    memory = _memory(settings)
    mx.set_memory_limit(mx.get_active_memory() + memory.most_bytes)
    spill = _spill(settings, loaded.model, model, memory)
    backend = kind(
        loaded,
        settings.prefill_step_tokens or default_chunk(),
        memory,
        spill,
        speculation_tokens=settings.speculation_tokens,
    )
    if backend.fits(1) is Fit.NEVER:
        raise ModelError(f"{model.path} leaves no memory for jobs; see MEMORY_LIMIT_BYTES.")
    left = 1 - READ_SHARE
    for _ in backend.warming():
        left *= _LEFT_A_PIECE
        yield 1 - left
    return backend


def _memory(settings: Settings) -> Memory:
    """What the model, which is loaded, leaves of the memory that MEMORY_LIMIT_BYTES or the device allows."""
    limit = settings.memory_limit_bytes or device_limit(settings.workers)
    left = max(0, limit - mx.get_active_memory())
    asked = settings.prefix_cache_bytes
    return Memory(left, int(SHARE_OF_PREFIXES * left) if asked == "auto" else asked)


def _spill(settings: Settings, loaded: Any, model: CatalogModel, memory: Memory) -> Spill | None:
    """The disk for prefixes, opened; None where there is to be none, or this model's cannot be written."""
    if not settings.prefix_disk_bytes or not memory.prefix_bytes or not pieces.storable(loaded):
        return None
    layout = f"{mx.default_device()} {type(loaded).__module__} {model.dtype} {model.quantize_bits}"
    if model.adapter is not None:  # one folder may be several models
        layout += fingerprint(model.adapter, "", "adapter_config.json")
    files = PrefixFiles(
        settings.prefixes_dir,
        fingerprint(model.path, layout),
        settings.prefix_disk_bytes,
        settings.retention_s,
    )
    spill = Spill(files, memory.prefix_bytes // SHARE_ON_THE_WAY)
    spill.open()
    return spill


def default_chunk() -> int:
    """Prompt tokens per row and chunk that suit the device."""
    return CHUNK_CPU if mx.default_device() == mx.cpu else CHUNK_GPU


def padding_worth_a_pass(loaded: LoadedModel) -> int:
    """Bytes of padding to which a step attends in the time in which it reads all weights once."""
    price = PADDING_PRICE_CPU if mx.default_device() == mx.cpu else 1
    return sum(array.nbytes for array in _parameters(loaded)) // price


class TextDetokenizer:
    """mlx-lm's streaming detokenizer, for one sequence."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def add(self, token: int) -> str:
        """The text that this token completes."""
        self._inner.add_token(token)
        return str(self._inner.last_segment)

    def finish(self) -> str:
        """What was held back."""
        self._inner.finalize()
        return str(self._inner.last_segment)


class TextBackend:
    """See `worker.runner.base.Backend`."""

    def __init__(
        self,
        loaded: LoadedModel,
        chunk: int,
        memory: Memory = UNLIMITED,
        spill: Spill | None = None,
        clock: Callable[[], float] = time.monotonic,
        speculation_tokens: int = 0,
    ) -> None:
        self.card = loaded.card
        self.eos = loaded.eos
        self.about = _about(loaded)
        self.weights_bytes = sum(array.nbytes for array in _parameters(loaded))
        self._tokenizer = loaded.tokenizer
        # Encoding sets options inside the tokenizer, so it is not shared with detokenizers, which only read.
        self._encoder = copy.deepcopy(loaded.tokenizer)
        self._model = loaded.model
        self._vocabulary = _vocabulary(loaded)
        self._chunk = chunk
        self._clock = clock
        self._stepped_at = clock()
        self._pace = Pace(chunk)
        footprint = Footprint.of(self._model)
        self._budget = Budget(memory.most_bytes, footprint)
        self._lengths: dict[int, int] = {}  # of the rows inserted, as long as they may grow
        self._prefixes = PrefixCache(self._model, memory.prefix_bytes, spill)
        self._arrivals = Arrivals(self._prefixes)
        self._prefill = self._new_prefill()
        self._speculation = Speculation(self._model, speculation_tokens, clock)
        self._batch = Lanes(self._model, self._prefixes, footprint, padding_worth_a_pass(loaded), self._speculation)
        # A row counts as prefilled when its first token is there: before that its prompt is only queued.
        self._joined: dict[int, int] = {}
        self._refused: dict[int, Exception] = {}
        self._steps = 0

    def encode(self, generation: Request, images: Mapping[str, bytes]) -> Prompt:
        """The prompt's tokens; see `Backend.encode`."""
        tokens, media = self._with_images(self._text_tokens(generation), generation, images)
        if not tokens:
            raise PromptError(JobFailure.TEMPLATE, "The prompt has no tokens.")
        if len(tokens) + 1 > self.card.context:
            detail = f"The prompt has {len(tokens)} tokens; the model takes {self.card.context} with the answer."
            raise PromptError(JobFailure.CONTEXT_LENGTH, detail)
        return Prompt(tuple(tokens), self._shared(generation, tokens), media)

    def detokenizer(self) -> Detokenizer:
        """A fresh one."""
        return TextDetokenizer(self._tokenizer.detokenizer)

    def fits(self, tokens: int, media: Media | None = None) -> Fit:
        """Whether there is memory for another row; prefixes give way."""
        return self._budget.fits(tokens, list(self._lengths.values()), self._passing(media))

    def grant(self, most_bytes: int, hoped_bytes: int = 0) -> None:
        """See `Backend.grant`."""
        self._budget = replace(self._budget, most_bytes=most_bytes, hoped_bytes=hoped_bytes)
        self._give_way()

    def insert(self, rows: Sequence[Row]) -> None:
        """Add rows. One that the model could not take fails with the next step, alone."""
        for row in rows:
            fault = _fault(row, self._vocabulary)
            if fault:
                self._refused[row.uid] = ValueError(fault)
                continue
            self._lengths[row.uid] = len(row.prompt) + row.room
            if not self._arrivals.add(row):
                self._begin(row)
        self._give_way()

    def step(self) -> StepResult:
        """Queue a chunk of prompts and a decode step, then read what the last step chose."""
        for row in self._arrivals.ready(idle=not (self._reading or self._batch)):
            self._begin(row)
        with exhaustion_told():
            chunk = self._read_on(decoding=len(self._batch) > 0)
            if chunk.rows:
                self._batch.join(chunk.rows, chunk.cache)
            drafted = self._speculation.drafted
            tokens = self._batch.step(quiet=not chunk.tokens and not self._reading)
        self._measure(chunk, bool(tokens) and drafted == self._speculation.drafted)
        prefilled, self._joined = (
            self._joined,
            {row.uid: reused for row, reused in zip(chunk.rows, chunk.reused, strict=True)},
        )
        failed, self._refused = self._refused, {}
        failed |= {row.uid: error for row, error in chunk.failed}
        self._forget(failed)
        self._steps += 1
        if self._steps % _CLEAR_EVERY == 0:
            mx.clear_cache()
        return StepResult(tokens, prefilled, list(failed.items()), chunk.tokens)

    def remove(self, uids: Iterable[int]) -> None:
        """Drop rows."""
        gone = frozenset(uids)
        self._forget(gone)
        self._arrivals.remove(gone)
        self._prefill.remove(gone)
        self._batch.remove(gone)
        self._joined = {uid: reused for uid, reused in self._joined.items() if uid not in gone}
        self._refused = {uid: error for uid, error in self._refused.items() if uid not in gone}

    def reset(self) -> None:
        """Drop every row and every prefix: what made the batch fail may be in them."""
        self._forget(list(self._lengths))
        self._prefixes.clear()
        self._arrivals.clear()
        self._prefill = self._new_prefill()
        self._batch.clear()
        self._joined.clear()
        self._refused.clear()

    def stats(self) -> dict[str, float]:
        """Memory in bytes, also what MLX keeps for later and used at most; lanes; chunks beside rows; guesses."""
        return {
            "memory_active_bytes": mx.get_active_memory(),
            "memory_spare_bytes": mx.get_cache_memory(),
            "memory_peak_bytes": mx.get_peak_memory(),
            "kv_bytes": self._prefill.nbytes() + self._batch.nbytes(),
            "decode_lanes": len(self._batch.lengths),
            "prefill_chunk_tokens": self._pace.tokens,
            **self._prefixes.stats(),
            **self._speculation.stats(),
        }

    def close(self) -> None:
        """Keep on disk what prefixes are in memory."""
        self._prefixes.close(CLOSE_S)

    def warm(self) -> None:
        """Run a chunk and a few steps, so that the first job finds every kernel compiled."""
        for _ in self.warming():
            pass

    def warming(self) -> Iterator[None]:
        """The same in pieces."""
        prompt = (0,) * (self._chunk + 1)
        self.insert([Row(-1 - i, prompt, 0, 3, Sampling(temperature=float(i), top_p=0.9)) for i in range(2)])
        while self._reading or self._batch:
            self.step()
            yield
        yield from self._speculation.warming()
        self.reset()
        if self._budget.fits(cost.BEHIND + self._chunk, []) is Fit.NOW:
            self._pace.expect((yield from cost.measuring(self._model, self._chunk)))

    @property
    def _reading(self) -> bool:
        """Whether any prompt is on its way into the cache."""
        return bool(self._prefill)

    def _begin(self, row: Row) -> None:
        """Read the prompt of a row that has what disk had of it."""
        self._prefill.add(row)

    def _read_on(self, *, decoding: bool) -> Chunk:
        """Queue the next piece of what is to be read."""
        return self._prefill.advance(decoding)

    def _new_prefill(self) -> Prefill:
        return Prefill(self._model, self._chunk, self._prefixes, self._pace)

    def _measure(self, chunk: Chunk, decoded: bool) -> None:
        """Tell the pace how long rows waited for a token each: since the last, whatever the time went into."""
        last, self._stepped_at = self._stepped_at, self._clock()
        if decoded:
            self._pace.stepped(self._stepped_at - last, None if chunk.rows else chunk.foretold)

    def _forget(self, uids: Iterable[int]) -> None:
        for uid in uids:
            self._lengths.pop(uid, None)
        self._give_way()

    def _give_way(self) -> None:
        """Leave to the prefixes what the rows will not need."""
        self._prefixes.allow(
            self._budget.most_bytes - self._budget.needed(list(self._lengths.values())) - self._passing()
        )

    def _passing(self, media: Media | None = None) -> int:  # noqa: ARG002 - see `VisionBackend`
        """Bytes beside the caches, for a while, for what rows show, and one more with it."""
        return 0

    def _text_tokens(self, generation: Request) -> list[int]:
        return self._plain(generation) if generation.messages is None else self._chat(generation.messages)

    def _with_images(
        self,
        tokens: list[int],
        generation: Request,  # noqa: ARG002
        images: Mapping[str, bytes],
    ) -> tuple[list[int], Media | None]:
        """Put the images where the template has them, and what they are."""
        if images:
            raise PromptError(JobFailure.TEMPLATE, "This model takes no images.")
        return tokens, None

    def _shared(self, generation: Request, tokens: Sequence[int]) -> int:
        """See `Prompt.shared`. The system message is rendered alone, so what follows it cannot be in it."""
        if not generation.share_system_prompt or not generation.messages:
            return 0
        try:
            alone = self._encoder.apply_chat_template(list(generation.messages[:1]), add_generation_prompt=False)
        except Exception:  # noqa: BLE001 - a template may want more than a system message
            return 0
        return common_length(tuple(alone), tuple(tokens))

    def _plain(self, generation: Request) -> list[int]:
        prompt = generation.prompt or ""
        bos = self._encoder.bos_token
        # As mlx-lm does: a prompt that writes the first special token itself gets no second one.
        return list(self._encoder.encode(prompt, add_special_tokens=bos is None or not prompt.startswith(bos)))

    def _chat(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        if not self._encoder.has_chat_template:
            raise PromptError(JobFailure.TEMPLATE, "This model has no chat template: send a prompt.")
        try:
            return list(self._encoder.apply_chat_template(list(messages), add_generation_prompt=True))
        except Exception as error:
            # A template is a program and may raise anything; only what it says itself is fit to be passed on.
            said = f": {error}" if type(error) is TemplateError else "."
            raise PromptError(JobFailure.TEMPLATE, f"The model's chat template refused the messages{said}") from error


def _fault(row: Row, vocabulary: int) -> str | None:
    """Why a row cannot go into a batch. What would raise, or read outside an array, must not get that far."""
    if not row.prompt or row.room < 1:
        return "the row has no prompt or no room"
    text = row.prompt if row.media is None else [token for token in row.prompt if token < IMAGE_TOKENS]
    if min(text) < 0 or max(text) >= vocabulary:
        return "the prompt has a token that the model does not know"
    if not all(map(math.isfinite, astuple(row.sampling))):
        return "a sampling value is not a finite number"
    return None


def _vocabulary(loaded: LoadedModel) -> int:
    """How many tokens the embedding has."""
    config = loaded.config
    return int(config.get("vocab_size") or config.get("text_config", {}).get("vocab_size") or len(loaded.tokenizer))


def _parameters(loaded: LoadedModel) -> Collection[mx.array]:
    return dict(tree_flatten(loaded.model.parameters())).values()


def _about(loaded: LoadedModel) -> dict[str, object]:
    types = {str(array.dtype).removeprefix("mlx.core.") for array in _parameters(loaded)}
    quantisation = loaded.config.get("quantization") or {}
    return {
        "device": str(mx.default_device()),
        "dtype": "/".join(sorted(types)),
        "quantisation_bits": quantisation.get("bits"),
        "parameters": get_total_parameters(loaded.model),  # type: ignore[no-untyped-call]
        "mlx": version("mlx"),
        "mlx_lm": version("mlx-lm"),
    }
