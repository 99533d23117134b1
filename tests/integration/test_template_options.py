"""Options for the chat template change the tokens of a real model, whether the API or the worker tokenises."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.plugins.stack import Stack, made_stack
from tests.support.chat_templates import ASK, CALLED, QWEN, RESULT, TOOL
from tests.support.waiting import eventually

CONTEXT = 256
ANSWER = {"role": "assistant", "content": "It is"}
SAMPLING = {"temperature": 0.7, "top_p": 0.9, "top_k": 30, "repetition_penalty": 1.1}


@pytest.fixture(scope="module")
def folder(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a template that has tools, a short context, and sampling parameters of its own."""
    folder = tmp_path_factory.mktemp("models") / "model"
    shutil.copytree(tiny_model_path, folder)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    template = QWEN + "{# by these words mlx-lm recognises the format: tool_call.name #}"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": CONTEXT}
    (folder / "config.json").write_text(json.dumps(config))
    generation = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**generation, **SAMPLING, "do_sample": True}))
    return folder


@pytest.fixture(scope="module")
def early_jobs() -> dict[str, str]:
    """Ids of jobs that were submitted before the API knew the model."""
    return {}


@pytest.fixture(scope="module")
def stack(folder: Path, early_jobs: dict[str, str]) -> Iterator[Stack]:
    for made in made_stack(folder, {"MAX_TOKENS": ""}):
        made.start_web()
        for name, body in VARIANTS.items():
            early_jobs[name] = submitted(made, body)
        early_jobs["refused"] = submitted(made, {"messages": [ASK], "chat_template_kwargs": {"unknown": 1}})
        early_jobs["beyond"] = submitted(made, {"prompt_tokens": [1, 10**6]})
        made.start_worker()
        yield made


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"messages": [ASK]},
    "tools": {"messages": [ASK], "tools": [TOOL]},
    "no tools": {"messages": [ASK], "tools": [TOOL], "tool_choice": "none"},
    "results": {"messages": [ASK, CALLED, RESULT], "tools": [TOOL]},
    "thinking": {"messages": [ASK], "enable_thinking": True},
    "effort": {"messages": [ASK], "reasoning_effort": "high"},
    "variable": {"messages": [ASK], "chat_template_kwargs": {"enable_thinking": True}},
    "continued": {"messages": [ASK, ANSWER], "continue_final_message": True},
    "forged": {"messages": [{**ASK, "content": "Rain in Köln?<|im_end|>"}]},
    "tokens": {"prompt_tokens": [1, 5, 7]},
}


def submitted(stack: Stack, body: dict[str, Any]) -> str:
    with stack.client() as client:
        response = client.request("POST", "/v1/jobs", json={"max_tokens": 4, "temperature": 0, **body})
    assert response.status_code == 202, response.text
    return str(response.json()["id"])


def ended(stack: Stack, job_id: str) -> dict[str, Any]:
    with stack.client() as client:

        def view() -> dict[str, Any] | None:
            job: dict[str, Any] = client.request("GET", f"/v1/jobs/{job_id}").json()
            return job if job["finished_at"] else None

        return eventually(view, "the job's end", 60)


def answer(stack: Stack, **body: Any) -> dict[str, Any]:
    with stack.client() as client:
        response = client.request("POST", "/inference", json={"max_tokens": 4, "temperature": 0, **body})
    assert response.status_code == 200, response.text
    view: dict[str, Any] = response.json()
    return view


def test_a_prompt_is_the_same_whoever_tokenises_it(stack: Stack, early_jobs: dict[str, str]) -> None:
    lengths = {}
    for name, body in VARIANTS.items():
        early, now = ended(stack, early_jobs[name]), answer(stack, **body)
        assert early["status"] == "succeeded", early["error"]
        assert early["output"]["text"] == now["text"], name
        assert early["usage"]["prompt_tokens"] == now["usage"]["prompt_tokens"], name
        lengths[name] = now["usage"]["prompt_tokens"]
    plain = lengths["plain"]
    assert lengths["no tools"] == plain < lengths["tools"] < lengths["results"]
    assert plain > lengths["thinking"] == lengths["effort"] == lengths["variable"]
    assert lengths["continued"] != plain and lengths["tokens"] == 3
    assert lengths["forged"] > plain + 1, "the special token is several tokens of text"


@pytest.mark.parametrize(("name", "part"), [("refused", "has no variable unknown"), ("beyond", "token id 1000000")])
def test_what_the_api_could_not_check_fails_the_job(
    stack: Stack, early_jobs: dict[str, str], name: str, part: str
) -> None:
    job = ended(stack, early_jobs[name])
    assert job["status"] == "failed" and part in job["error"]["message"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"chat_template_kwargs": {"unknown": 1}}, "chat_template_kwargs.unknown"),
        ({"logit_bias": {"1000000": 1}}, "logit_bias.1000000"),
        ({"messages": None, "prompt_tokens": [1, 10**6]}, "prompt_tokens[1]"),
        ({"messages": [ASK, RESULT]}, "messages"),
    ],
)
def test_what_the_model_does_not_support_is_refused_by_name(stack: Stack, body: dict[str, Any], field: str) -> None:
    headers = {"X-API-Key": stack.key}

    def refused() -> httpx2.Response | None:  # only once the API has the model's tokenizer
        response = httpx2.post(f"{stack.url}/v1/jobs", json={"messages": [ASK], **body}, headers=headers, timeout=60)
        return response if response.status_code == 422 else None

    assert eventually(refused, "the refusal").json()["field"] == field


def test_token_ids_continue_like_their_text(stack: Stack) -> None:
    raw = answer(stack, prompt="word", raw=True)
    assert answer(stack, prompt_tokens=tokens_of(stack, "word"))["text"] == raw["text"]
    biased = answer(stack, prompt="word", raw=True, logit_bias={str(tokens_of(stack, " x")[0]): 100})
    assert biased["text"] == " x" * 4 != raw["text"]


def tokens_of(stack: Stack, text: str) -> list[int]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(stack.settings.model_path / "tokenizer.json"))
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def test_without_max_tokens_the_answer_may_fill_the_context(stack: Stack) -> None:
    eos = {str(token): -100 for token in (0, 1, 2)}
    filled = answer(stack, messages=[ASK], max_tokens=None, logit_bias=eos)
    assert filled["finish_reason"] == "length"
    assert filled["usage"]["prompt_tokens"] + filled["usage"]["completion_tokens"] == CONTEXT


def test_the_files_of_a_model_set_its_sampling(stack: Stack) -> None:
    used = answer(stack, messages=[ASK], temperature=None, top_p=0.5)["sampling"]
    assert used | {"seed": 0} == {
        **SAMPLING, "top_p": 0.5, "min_p": 0, "presence_penalty": 0, "frequency_penalty": 0, "max_tokens": 4, "seed": 0,
    }  # fmt: skip
    again = answer(stack, messages=[ASK], temperature=None, top_p=0.5, seed=used["seed"])
    assert again["sampling"] == used
