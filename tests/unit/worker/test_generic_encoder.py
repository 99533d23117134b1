"""Images of any family: their tokens as a processor writes them, the chat template, and attention within an image."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx_vlm")

import mlx.core as mx
from jinja2 import Environment
from mlx import nn
from PIL import Image

from shared.tokenizing.messages import TokenizerSource
from tests.support.tokenizers import byte_tokenizer
from worker.models.image_templates import rewritten
from worker.models.tokenizer_helper import FolderTokenizer
from worker.runner.column_cache import NO_SPAN, ColumnCache
from worker.runner.loading import _processing
from worker.runner.vision.families import FAMILIES
from worker.runner.vision.generic_encoder import GenericEncoder
from worker.runner.vision.images import PlacedImage
from worker.runner.vision.load import _placeholder

_BEGIN, _BREAK, _SOFT, _END = 1, 2, 3, 4
_TEXT = {_BEGIN: "<s>", _BREAK: "\n\n", _SOFT: "<soft>", _END: "<end>"}


class Tokenizer:
    """Adds a token for the beginning of each text."""

    def __call__(self, text: str) -> Any:
        return type("Encoding", (), {"input_ids": [_BEGIN] if not text else [_BEGIN, _SOFT]})()

    def decode(self, ids: list[int]) -> str:
        return "".join(_TEXT[token] for token in ids)


class Processor:
    """Writes one token per 10 pixels of width, with line breaks around them."""

    tokenizer = Tokenizer()

    def __init__(self) -> None:
        self.sizes: list[tuple[int, int]] = []

    def __call__(self, images: list[Image.Image], text: list[str]) -> dict[str, Any]:
        assert text == ["<image>"]
        (image,) = images
        self.sizes.append(image.size)
        if image.height > 1000:
            raise ZeroDivisionError("too high")
        soft = [_SOFT] * (image.width // 10)
        ids = [_BEGIN, _BREAK, *soft, *([_END] if soft else []), _BREAK]
        return {"input_ids": [ids], "pixel_values": np.zeros((1, 3, image.height, image.width), np.float32)}


class Language:
    """Has embeddings, like a language model."""

    def embed(self, tokens: mx.array) -> mx.array:
        return tokens[..., None].astype(mx.float32)


class Layer(nn.Module):  # type: ignore[misc,name-defined]
    """Adds one, and returns a tuple like some layers."""

    def __call__(self, values: mx.array) -> tuple[mx.array, None]:
        return values + 1, None


class Model(nn.Module):  # type: ignore[misc,name-defined]
    """Adds the number of pixels, and one per layer, to the embeddings of soft tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.audio_tower = nn.Linear(1, 1)  # type: ignore[attr-defined]
        self.others = [Layer()]
        self.layers = [Layer() for _ in range(12)]

    def get_input_embeddings(self, ids: mx.array, pixels: mx.array, mask: mx.array) -> Any:
        assert mask.shape == ids.shape
        embeds = self.language_model.model.embed_tokens(ids)
        more = mx.array(pixels.shape[2] * pixels.shape[3])
        for layer in self.layers:
            more, _ = layer(more)
        return type("Features", (), {"inputs_embeds": embeds + mx.where(ids == _SOFT, more, 0)[..., None]})()


@pytest.fixture
def processor() -> Processor:
    return Processor()


@pytest.fixture
def encoder(processor: Processor) -> GenericEncoder:
    language: Any = Language()
    return GenericEncoder(Model(), processor, language, "<image>")


def test_an_image_has_the_tokens_of_its_processor_without_the_text_around(
    encoder: GenericEncoder, processor: Processor
) -> None:
    assert encoder.layout(30, 20).ids == (_SOFT, _SOFT, _SOFT, _END)
    assert encoder.layout(30, 20).tokens == 4
    assert processor.sizes == [(30, 20)], "a size is processed once"


def test_features_include_tokens_that_are_not_of_the_image(encoder: GenericEncoder) -> None:
    layout, inputs = encoder._processed(Image.new("RGB", (20, 10)))
    *_, features = encoder.stages(inputs, layout)
    assert features.tolist() == [[[_SOFT + 212], [_SOFT + 212], [_END]]]
    assert encoder.tower.audio_tower is None


def test_each_layer_is_a_stage(encoder: GenericEncoder) -> None:
    layout, inputs = encoder._processed(Image.new("RGB", (20, 10)))
    *stages, _ = encoder.stages(inputs, layout)
    assert encoder.blocks == 12
    assert [stage.item() for stage in stages] == list(range(201, 212))


def test_an_image_that_the_model_cannot_encode_is_reported_before_its_first_stage(encoder: GenericEncoder) -> None:
    layout, inputs = encoder._processed(Image.new("RGB", (20, 10)))
    with pytest.raises(ValueError, match=r"cannot encode this image: .*more"):
        encoder.stages({**inputs, "more": 1}, layout)


@pytest.mark.parametrize(("size", "problem"), [((5, 5), "too small"), ((50, 2000), "cannot be read: too high")])
def test_a_size_that_a_processor_does_not_support_is_refused(
    encoder: GenericEncoder, size: tuple[int, int], problem: str
) -> None:
    with pytest.raises(ValueError, match=f"{size[0]} x {size[1]} pixels .*{problem}"):
        encoder.layout(*size)


def test_a_strip_of_pixels_is_refused_before_a_processor_enlarges_it(
    encoder: GenericEncoder, processor: Processor
) -> None:
    with pytest.raises(ValueError, match="over 200 times the other"):
        encoder.layout(2010, 10)
    assert processor.sizes == []
    assert encoder.layout(2000, 10).tokens == 201


def test_an_image_of_another_size_than_in_the_request_is_refused(encoder: GenericEncoder, tmp_path: Any) -> None:
    Image.new("RGB", (40, 10)).save(tmp_path / "image.png")
    data = (tmp_path / "image.png").read_bytes()
    assert encoder.pixels(PlacedImage("d", encoder.layout(40, 10), data, 400))
    with pytest.raises(ValueError, match="differs from the size in the request"):
        encoder.pixels(PlacedImage("d", encoder.layout(20, 10), data, 400))


@pytest.mark.parametrize("template", ["{{ 'a<image>b' }}", "a<image>b", '{% if true %}a{{ "<image>" }}{% endif %}b'])
def test_a_template_is_rewritten_in_literals_and_outside(template: str) -> None:
    new = rewritten(template, "<image>", "\n\n<soi>\n\n")
    assert Environment(trim_blocks=True, autoescape=False).from_string(new).render() == "a\n\n<soi>\n\nb"


@pytest.mark.parametrize(
    ("family", "image", "text"),
    [
        ("gemma3", "<start_of_image>", "user: \n\n<start_of_image>\n\nWhat?"),
        ("internvl_chat", "<image>\n", "user: <IMG_CONTEXT>\nWhat?"),
        ("llava", "<image>\n", "user: <image>\nWhat?"),
    ],
)
def test_a_folder_is_tokenised_with_a_text_that_stands_for_an_image(
    tmp_path: Path, family: str, image: str, text: str
) -> None:
    files = {
        "config.json": json.dumps({"model_type": family}),
        "tokenizer.json": byte_tokenizer(),
        "tokenizer_config.json": '{"tokenizer_class": "PreTrainedTokenizerFast"}',
        "chat_template.jinja": "{% for m in messages %}{{ m.role }}: {% for part in m.content %}{% if part.text %}"
        "{{ part.text }}{% else %}{{ '" + image.replace("\n", "\\n") + "' }}{% endif %}{% endfor %}{% endfor %}",
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    tokenizer = FolderTokenizer.load(TokenizerSource(str(tmp_path), vision=True))
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    assert tokenizer.wrapper.apply_chat_template(messages, tokenize=False) == text


@pytest.mark.parametrize("template", [None, "{% for m in messages %}{{ m.content }} {% endfor %}"])
def test_a_folder_of_deepseek_ocr_needs_no_template_for_images(tmp_path: Path, template: str | None) -> None:
    files = {
        "config.json": '{"model_type": "deepseekocr"}',
        "tokenizer.json": byte_tokenizer(),
        "tokenizer_config.json": '{"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}',
        **({"chat_template.jinja": template} if template else {}),
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    tokenizer = FolderTokenizer.load(TokenizerSource(str(tmp_path), vision=True))
    assert tokenizer.has_template
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Free OCR."}]}]
    render = partial(tokenizer.wrapper.apply_chat_template, messages, tokenize=False)
    assert render() == "<s><image>\nFree OCR."
    assert render(grounding=True) == "<s><image>\n<|grounding|>Free OCR."


def test_prefixes_on_disk_depend_on_the_settings_of_the_processor(tmp_path: Path) -> None:
    before = _processing(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"size": 1}')
    first = _processing(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"size": 2}')
    assert len({before, first, _processing(tmp_path)}) == 3


@pytest.mark.parametrize("config", [{}, {"image_token_id": None}, {"image_token_id": "<none>"}])
def test_a_model_without_an_image_token_is_refused(config: dict[str, object]) -> None:
    class Vocabulary:
        def convert_tokens_to_ids(self, token: str) -> int | None:
            return {"<image>": 7}.get(token)

    family = FAMILIES["llava"]
    assert _placeholder(family, {"image_token_index": 3}, Vocabulary()) == 3
    assert _placeholder(family, {"image_token_index": "<image>"}, Vocabulary()) == 7
    with pytest.raises(ValueError, match="image token"):
        _placeholder(family, config, Vocabulary())


def test_tokens_of_a_span_attend_to_each_other() -> None:
    cache = ColumnCache([0, 1], window=2)
    keys = mx.zeros((2, 1, 2, 4))
    cache.update_and_fetch(keys, keys)
    cache.spans = mx.array([[NO_SPAN, 0, 0, 0], [1, 1, NO_SPAN, NO_SPAN]])
    mask = cache.make_mask(4, window_size=2)
    assert mask is not None
    first, second = (mask[row, 0].astype(mx.int32).tolist() for row in range(2))
    # The columns are the token before the pass that the window still reaches, and the four of the pass.
    assert first == [[1, 1, 0, 0, 0], [0, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 1, 1, 1]]
    assert second == [[1, 1, 1, 0, 0], [0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]
