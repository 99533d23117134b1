"""What is checked for each family of vision models, against mlx-vlm's own loop for one prompt."""

from __future__ import annotations

import io
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, Self

import mlx.core as mx
import pytest
from mlx.nn import Linear  # type: ignore[attr-defined]
from mlx_vlm import load as load_with_mlx_vlm
from mlx_vlm.convert import convert
from mlx_vlm.generate import generate_step
from mlx_vlm.models.cache import make_prompt_cache
from mlx_vlm.utils import prepare_inputs
from PIL import Image

from shared.jobs.request import Request
from tests.architectures.batches import TOLERANCE
from tests.architectures.vision_models import VISION_MODELS, build
from tests.architectures.vision_spec import VisionModel
from tests.support.runner import GREEDY, resumed, step
from tests.support.vision_runner import ImageFiles, prompt_of, row, template_parts
from worker.runner.base import EncodeWork, Row, StepPlan
from worker.runner.column_cache import SLACK
from worker.runner.memory import Memory
from worker.runner.model_runner import MLXRunner
from worker.runner.vision.load import load_vision_model

CHUNK = 32
TOKENS = 8
CUT = 4
"""Tokens after which a row is removed, and continues as another one, as after the death of a worker."""
_ALTERNATIVES = 5
_GROUP = 32
_SIZES: Final = ((300, 200), (64, 480), (200, 180), (60, 50))


@dataclass
class Answer:
    """Tokens of a row, with the log-probabilities of each and of its alternatives."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[dict[int, float]] = field(default_factory=list)


class Subject:
    """A family's tiny model in a runner, and in mlx-vlm.

    Args:
        folder: for the model.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self._open(VISION_MODELS[name], build(name, folder / name))

    def quantised(self, folder: Path, predicate: Callable[[str, Any], Any] | None = None) -> Self:
        """Return the same model, quantised by mlx-vlm into a new folder.

        Args:
            predicate: how to quantise a layer; None: mlx-vlm's choice, which leaves out most image encoders.
        """
        with redirect_stdout(io.StringIO()):
            convert(
                str(self.folder), str(folder), quantize=True, q_group_size=_GROUP, q_bits=4, trust_remote_code=False,
                quant_predicate=predicate,  # type: ignore[arg-type] # also takes functions
            )  # fmt: skip
        shutil.copy(self.folder / "chat_template.jinja", folder)  # some processors do not save it
        return self.of(self.spec, folder)

    @classmethod
    def of(cls, spec: VisionModel, folder: Path) -> Self:
        """Return the model of an existing folder."""
        subject = cls.__new__(cls)
        subject._open(spec, folder)
        return subject

    def _open(self, spec: VisionModel, folder: Path) -> None:
        self.spec = spec
        self.folder = folder
        self.files = ImageFiles()
        self._loaded = load_vision_model(folder)
        self._reference: Any = None

    @contextmanager
    def runner(self, chunk: int = CHUNK, prefix_bytes: int = 2**28) -> Iterator[MLXRunner]:
        """A new runner without prefixes and cached images."""
        loaded, vision = self._loaded
        memory, batching = Memory(2**30, prefix_bytes), self.spec.batching
        runner = MLXRunner(loaded, chunk, memory, None, vision, batching=batching, speculation_tokens=4)
        try:
            yield runner
        finally:
            runner.close()

    def image(self, width: int, height: int, seed: int) -> dict[str, Any]:
        """A part of a message."""
        return self.files.part(width, height, seed)

    def row(self, runner: MLXRunner, uid: int, request: Request) -> Row:
        """A row for a request, which may store prefixes."""
        return row(prompt_of(runner, request, self.files), request, uid, "me")

    def compare(self, request: Request, answer: Answer, tolerance: float = TOLERANCE) -> None:
        """Compare an answer with mlx-vlm's, up to a choice between tokens that are equally probable."""
        if len(request.image_parts) > 1 and self.spec.images == 1:
            return
        for (token, logprobs), chosen, ours in zip(
            self._expected(request), answer.tokens, answer.logprobs, strict=True
        ):
            for each, logprob in ours.items():
                assert logprobs[each].item() == pytest.approx(logprob, abs=tolerance)
            assert (logprobs[token] <= logprobs[chosen] + tolerance).item()
            if chosen != token:
                break

    def _expected(self, request: Request) -> Iterator[tuple[int, mx.array]]:
        if self._reference is None:
            self._reference = load_with_mlx_vlm(str(self.folder))
        model, processor = self._reference
        text = text_of(processor.tokenizer, request)
        images = [Image.open(io.BytesIO(self.files[part["image"]])).convert("RGB") for part in request.image_parts]
        if self.spec.features is not None:
            yield from self._expected_of_features(model, processor, text, images, request.max_tokens)
            return
        try:
            inputs = prepare_inputs(processor, images=images or None, prompts=[text])
        except ValueError:  # some processors do not take its further arguments
            inputs = dict(processor(images=images, text=[text]))
        ids, pixels, mask = (inputs.pop(name, None) for name in ("input_ids", "pixel_values", "attention_mask"))
        steps = generate_step(ids, model, pixels, mask, max_tokens=request.max_tokens, temperature=0.0, **inputs)
        for _, (token, logprobs) in zip(range(request.max_tokens), steps, strict=False):
            yield int(token), logprobs

    def _expected_of_features(
        self, model: Any, processor: Any, text: str, images: Sequence[Image.Image], max_tokens: int
    ) -> Iterator[tuple[int, mx.array]]:
        """Yield what mlx-vlm's language model answers to a prompt with these features of images."""
        assert self.spec.features is not None
        token, language = processor.image_token_id, model.language_model
        waiting = iter(images)
        ids: list[int] = []
        embeds: list[mx.array] = []
        for each in processor.tokenizer(text, add_special_tokens=False).input_ids:
            features = language.model.embed_tokens(mx.array([each]))
            if each == token:
                features = mx.array(self.spec.features(model, processor, next(waiting)))
            embeds.append(features)
            ids += [each] * len(features)
        cache = make_prompt_cache(language)
        logits = language(mx.array([ids]), inputs_embeds=mx.concatenate(embeds)[None], cache=cache).logits
        for _ in range(max_tokens):
            logprobs = logits[0, -1] - mx.logsumexp(logits[0, -1])
            chosen = mx.argmax(logprobs)
            yield int(chosen), logprobs
            logits = language(chosen.reshape(1, 1), cache=cache).logits


def text_of(tokenizer: Any, request: Request) -> str:
    """Return what the chat template writes for a request."""
    assert request.messages is not None
    messages = [{**each, "content": template_parts(each["content"])} for each in request.messages]
    return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


def asking(*messages: str | Sequence[Any]) -> Request:
    """Return a request with a conversation: the user's first message, then in turns.

    Args:
        messages: text, or parts of text and images.
    """
    roles = ("user", "assistant")
    turns = [
        {
            "role": roles[number % 2],
            "content": each
            if isinstance(each, str)
            else [part if isinstance(part, dict) else {"type": "text", "text": part} for part in each],
        }
        for number, each in enumerate(messages)
    ]
    return Request("m", TOKENS, GREEDY, logprobs=_ALTERNATIVES, messages=tuple(turns))


def answers(
    runner: MLXRunner, rows: Sequence[Row], at_once: int = 100, cut: Sequence[int] = ()
) -> tuple[dict[int, Answer], dict[int, int]]:
    """Run rows until all have their tokens.

    Args:
        at_once: rows to insert first; the others join one after another.
        cut: uids of rows that are removed once, and continue.

    Returns:
        By uid, the answers, and the number of reused prompt tokens.
    """
    found: dict[int, Answer] = defaultdict(Answer)
    reused: dict[int, int] = {}
    alias = {each.uid: each.uid for each in rows}
    by_uid = {each.uid: each for each in rows}
    waiting = list(rows[at_once:])
    runner.insert(rows[:at_once])
    steps = 0
    while any(len(found[each.uid].tokens) < each.max_new_tokens for each in rows):
        if steps % 2 and waiting:
            runner.insert([waiting.pop(0)])
        output = step(runner)
        assert not output.failed
        reused |= output.prefilled
        for each in output.tokens:
            answer = found[alias[each.uid]]
            answer.tokens.append(each.token)
            assert each.logprob is not None
            answer.logprobs.append({each.token: each.logprob, **dict(each.top_logprobs)})
            if len(answer.tokens) == CUT and each.uid in cut:
                runner.remove([each.uid])
                alias[each.uid + 100] = each.uid
                runner.insert([resumed(by_uid[each.uid], each.uid + 100, answer.tokens)])
        steps += 1
        assert steps < 2000
    return found, reused


def check_batched(subject: Subject) -> None:
    """Eight rows with images and eight without, that join late or continue, are as mlx-vlm generates them alone."""
    requests = []
    for number in range(8):
        count = 1 + number % subject.spec.images
        images = [subject.image(*_SIZES[(number + i) % len(_SIZES)], seed=number // 2) for i in range(count)]
        requests += [asking([*images, f"Question {number}?"]), asking(f"Only words, {'many ' * number}of them.")]
    with subject.runner() as runner:
        rows = [subject.row(runner, uid, each) for uid, each in enumerate(requests)]
        found, _ = answers(runner, rows, at_once=6, cut=(0, 1, 6))
    for uid, each in enumerate(requests):
        subject.compare(each, found[uid])


def check_conversation(subject: Subject) -> None:
    """Several images in a turn and in a conversation; the next turn reuses the prefix, and encodes only its image."""
    one, two, three = (subject.image(*_SIZES[seed], seed) for seed in range(3))
    first = asking([one, "and", two, "differ?"])
    second = asking([one, "and", two, "differ?"], "Yes.", [three, "And this?"])
    with subject.runner() as runner:
        found, _ = answers(runner, [subject.row(runner, 1, first)])
        subject.compare(first, found[1])
        in_order = found[1].logprobs[0]
        assert runner.stats()["images_encoded_total"] == 2
        found, reused = answers(runner, [subject.row(runner, 2, second)])
        subject.compare(second, found[2])
        assert runner.stats()["images_encoded_total"] == 3
        assert reused[2] > len(prompt_of(runner, first, subject.files).tokens) // 2
        other = asking([two, "and", one, "differ?"])
        found, reused = answers(runner, [subject.row(runner, 3, other)])
        subject.compare(other, found[3])
        assert in_order != pytest.approx(found[3].logprobs[0], abs=10 * TOLERANCE), "images make no difference"
        assert runner.stats()["images_encoded_total"] == 3, "the images are cached"
        assert reused[3] < 20, "another image has another prefix"


def check_sizes(subject: Subject) -> None:
    """Tiny, long and huge images."""
    least = subject.spec.min_side
    sizes = ((max(3, least), max(3, least)), (28, 28), (1300, max(40, 2 * least)), (40, 900), (1000, 700))
    requests = [asking([subject.image(*size, seed), "What?"]) for seed, size in enumerate(sizes)]
    with subject.runner(chunk=256) as runner:
        found, _ = answers(runner, [subject.row(runner, uid, each) for uid, each in enumerate(requests)])
    for uid, each in enumerate(requests):
        subject.compare(each, found[uid])


def check_memory(subject: Subject) -> None:
    """The memory of rows and of encoding images is predicted, including what the next tokens need."""
    requests = [replace(asking([subject.image(400, 300, seed), "What?"]), max_tokens=1000) for seed in range(4)]
    with subject.runner(prefix_bytes=0) as runner:
        for _ in runner._vision.warming():  # type: ignore[union-attr]
            pass
        rows = [subject.row(runner, uid, each) for uid, each in enumerate(requests)]
        runner.insert(rows)
        for task in runner._vision._tasks.values():  # type: ignore[union-attr]
            if task.pixels is not None:  # large images are decoded later
                task.pixels.result()  # processors may compute with MLX
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        while runner.stats()["images_encoded_total"] < len(rows):
            if (pixels := runner._vision.next_pixels()) is not None:  # type: ignore[union-attr]
                pixels.result()
            runner.execute(StepPlan(encode=EncodeWork()))
        features = sum(each.nbytes for row in rows for each in row.media.features.values())  # type: ignore[union-attr]
        assert mx.get_peak_memory() - before <= runner.encode_bytes(rows[0].media) + features
        generated = [0] * len(rows)
        while min(generated) < CUT:
            for each in step(runner).tokens:
                generated[each.uid] += 1
        now = [len(each.prompt) + tokens for each, tokens in zip(rows, generated, strict=True)]
        held = runner.stats()["kv_bytes"]
        assert held <= 1.05 * runner.batch_bytes(now)
        assert held >= 0.95 * runner.batch_bytes([length - SLACK for length in now])


def check_quantised(subject: Subject) -> None:
    """Folders that mlx-vlm has quantised, without the image encoder and with it."""
    for predicate in (None, _with_encoder):
        with TemporaryDirectory() as folder:
            _check_quantised(subject.quantised(Path(folder) / "quantised", predicate))


def _with_encoder(path: str, module: Any) -> bool | dict[str, Any]:
    """Quantise the linear layers of the encoder, with more bits. mlx-vlm cannot read quantised positions of patches."""
    if not hasattr(module, "to_quantized") or module.weight.shape[-1] % _GROUP:
        return False
    if path.startswith("language_model"):
        return True
    return isinstance(module, Linear) and {"group_size": _GROUP, "bits": 8, "mode": "affine"}


def _check_quantised(subject: Subject) -> None:
    requests = [asking([subject.image(300, 200, 1), "What?"]), asking("Only words.")]
    with subject.runner() as runner:
        rows = [subject.row(runner, uid, each) for uid, each in enumerate(requests)]
        answered, _ = answers(runner, rows)
    for uid, each in enumerate(requests):
        subject.compare(each, answered[uid], subject.spec.quantised_tolerance)


CHECKS: Final[Mapping[str, Callable[[Subject], None]]] = {
    "batched": check_batched,
    "conversation": check_conversation,
    "sizes": check_sizes,
    "memory": check_memory,
    "quantised": check_quantised,
}
"""All checks by name."""
