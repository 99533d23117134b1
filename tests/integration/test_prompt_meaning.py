"""A prompt gives the same tokens on every route, whichever process tokenises it, and whether or not the API knows the
model's card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlx_lm")

from mlx_lm import tokenizer_utils

from shared.errors import PromptRefused
from shared.jobs.request import Request, Sampling
from shared.models.registry import ModelCard, Registry
from shared.redis.client import Redis
from shared.settings import Settings
from shared.tokenizing.client import Tokenizing
from shared.tokenizing.files import TokenizerFiles
from tests.support.fake_redis import FakeRedis
from tests.unit.web.test_admission import FakeNotifier, make_admission
from web.admission.admit import RequestContext
from web.admission.prompt_tokenizer import PromptTokenizer
from web.schemas.requests import InferenceRequest, JobRequest
from worker.models.tokenizer_proof import HELPER, prove, unproved

PROMPT = "What is the capital of France?"
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
TEMPLATES: dict[str, tuple[Any, bool]] = {
    "one": (TEMPLATE, True),
    "none": (None, False),
    "named, with a default": (
        [{"name": "tool_use", "template": "no"}, {"name": "default", "template": TEMPLATE}],
        True,
    ),
    "named, without a default": ([{"name": "tool_use", "template": "no"}], False),
}
ROUTES = {"/v1/jobs and scripts/batch": JobRequest, "/inference": InferenceRequest}


@pytest.fixture(scope="module")
def worker() -> Iterator[Tokenizing]:
    with Tokenizing(60.0, HELPER) as tokenizing:
        yield tokenizing


@pytest.fixture(scope="module")
def api() -> Iterator[Tokenizing]:
    with Tokenizing(60.0) as tokenizing:
        yield tokenizing


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_prompt_has_one_meaning(
    template: str, smollm2_path: Path, tmp_path: Path, worker: Tokenizing, api: Tokenizing
) -> None:
    definition, is_used = TEMPLATES[template]
    folder = model_folder(tmp_path / "model", smollm2_path, definition)
    settings = Settings(data_dir=tmp_path / "data", model_path=folder)
    wrapper: Any = tokenizer_utils.load(folder, {})
    plain = wrapper.encode(PROMPT)
    chat = [{"role": "user", "content": PROMPT}]
    expected = wrapper.apply_chat_template(chat, add_generation_prompt=True) if is_used else plain
    proved = prove(unproved(folder, ModelCard("model", "text", 100)), settings.tokenizers_dir)
    assert proved.file is not None

    for kind in ROUTES.values():
        for raw, tokens in ((False, expected), (True, plain)):
            request = kind.model_validate({"prompt": PROMPT, "raw": raw})
            unknown, nothing = submitted(request, settings, api, None)
            assert nothing is None, "the worker tokenises"
            for source in proved.sources:
                assert list(worker.tokenize(source, unknown).tokens) == tokens
            card = proved.card(ModelCard("model", "text", 100))
            known, tokenized = submitted(request, settings, api, card)
            assert list(tokenized or ()) == tokens
            assert (known.prompt, known.raw) == (unknown.prompt, unknown.raw) == (PROMPT, raw)
    if is_used:
        same, tokenized = submitted(JobRequest.model_validate({"messages": chat}), settings, api, card)
        assert list(tokenized or ()) == expected
        assert same.messages == tuple(chat)


def model_folder(folder: Path, smollm2: Path, template: Any) -> Path:
    """A folder with SmolLM2's tokenizer and another chat template."""
    folder.mkdir()
    for name in ("tokenizer.json", "config.json"):
        shutil.copy(smollm2 / name, folder)
    config = json.loads((smollm2 / "tokenizer_config.json").read_text()) | {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


def submitted(
    request: JobRequest, settings: Settings, tokenizing: Tokenizing, card: ModelCard | None
) -> tuple[Request, tuple[int, ...] | None]:
    """Return the stored request, and the tokens that the API stores with it."""
    client: Redis = FakeRedis()
    files = TokenizerFiles(settings.tokenizers_dir)
    if card is not None:
        Registry(client).announce_model(card)
    admission = make_admission(client, settings, FakeNotifier())
    admission._prompt_tokenizer = PromptTokenizer(tokenizing, files)
    request = request.model_copy(update={"seed": 1})
    submission = admission.submission(request, RequestContext("me"))
    return submission.request, submission.tokens


def test_the_worker_names_a_token_beyond_the_embedding(smollm2_path: Path, worker: Tokenizing) -> None:
    source = unproved(smollm2_path, ModelCard("model", "text", 100)).folder
    request = Request("m", 1, Sampling(0.0), prompt="<|im_end|>")
    assert worker.tokenize(source, request, vocabulary=3).tokens == (2,)
    with pytest.raises(PromptRefused, match="contains the token '<\\|im_end\\|>' \\(id 2\\)"):
        worker.tokenize(source, request, vocabulary=2)
