"""Prefixes through the API and real worker processes, which are stopped, killed and restarted."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlx_lm")

from scripts.client.api import Client, RemoteJob
from shared.jobs.record import Status
from tests.plugins.stack import Stack, made_stack
from tests.support.architectures import write_folder
from tests.support.chat_templates import THINKING
from tests.support.waiting import eventually
from web.access.api_keys import KeyStore

SYSTEM = "You answer in few words and name your sources, whatever you are asked. " * 50
MIN_TOKENS = 5 * 128


def ask(stack: Stack, question: str, key: str = "", system: str = SYSTEM, **more: Any) -> RemoteJob:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    with Client(stack.url, key or stack.key) as client:
        return finished(client, {"messages": messages, "temperature": 0, "max_tokens": 4, **more})


def finished(client: Client, body: dict[str, Any]) -> RemoteJob:
    """Submit a job and wait for its end."""
    job = client.submit(body, wait_s=60)
    while not job.status.terminal:
        job = client.job(job.id, wait_s=60)
    assert job.status is Status.SUCCEEDED
    return job


def cached_tokens(job: RemoteJob) -> int:
    return int(job.usage["cached_tokens"])


def stat(stack: Stack, name: str) -> float:
    return sum(worker.stats.get(name, 0) for worker in stack.ready_workers())


def files(stack: Stack) -> list[Path]:
    return list((stack.home / "data/prefixes").rglob("*.safetensors"))


def test_a_restarted_worker_reads_the_prefixes_of_its_predecessor(tiny_stack: Stack) -> None:
    stack = tiny_stack
    first = stack.start_worker()
    job = ask(stack, "Why is the sky blue?")
    assert job.usage["prompt_tokens"] >= MIN_TOKENS
    assert cached_tokens(job) == 0
    assert stack.stop(first) == 0
    assert len(files(stack)) >= MIN_TOKENS // 128
    stack.start_worker()
    again = ask(stack, "Why is the sky blue?")
    assert cached_tokens(again) >= MIN_TOKENS
    assert again.text == job.text
    assert cached_tokens(ask(stack, "Is it so at night?")) >= MIN_TOKENS
    eventually(
        lambda: stat(stack, "prefix_disk_read_blocks_total") >= MIN_TOKENS // 128, "blocks are read from disk", 10
    )


def test_reused_prefixes_survive_a_kill(tiny_stack: Stack) -> None:
    stack = tiny_stack
    first = stack.start_worker()
    for question in ("Why is the sky blue?", "Is it so at night?"):
        job = ask(stack, question)
    eventually(lambda: stat(stack, "prefix_disk_written_blocks_total") >= MIN_TOKENS // 128, "prefix is on disk", 10)
    assert stack.stop(first, signal.SIGKILL) == -signal.SIGKILL
    stack.start_worker()
    again = ask(stack, "Is it so at night?")
    assert cached_tokens(again) >= MIN_TOKENS
    assert again.text == job.text


@pytest.fixture(scope="module", params=["gemma3_text", "qwen3_5"])
def kind_stack(
    request: pytest.FixtureRequest, tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    """The API and a worker, for a tiny model that thinks and has sliding windows or recurrent layers."""
    folder = write_folder(request.param, tmp_path_factory.mktemp("models") / request.param, tiny_model_path)
    _mark_thoughts(folder)
    for stack in made_stack(folder, {"LEASE_S": "1"}):
        stack.start_web()
        stack.start_worker()
        yield stack


def _mark_thoughts(folder: Path) -> None:
    """Give a model's tokenizer markers around thoughts, and a template that uses them."""
    names = {"<jupyter_output>": "<think>", "<jupyter_script>": "</think>"}  # tokens that no test needs
    for file in (folder / "tokenizer.json", folder / "tokenizer_config.json"):
        text = file.read_text()
        for token, marker in names.items():
            text = text.replace(token, marker)
        content = json.loads(text)
        if file.name == "tokenizer.json":
            added = content["added_tokens"]
        else:
            content["chat_template"] = THINKING
            added = content["added_tokens_decoder"].values()
        for token in added:
            token["special"] = token["special"] and token["content"] not in names.values()
        file.write_text(json.dumps(content))


def test_turns_reuse_a_conversation_without_its_thoughts(kind_stack: Stack) -> None:
    """With another key nothing is cached, and the answers are the same."""
    stack, opened = kind_stack, 2  # tokens at the end of a prompt that begin the thoughts
    messages: list[dict[str, Any]] = [{"role": "system", "content": SYSTEM}]
    repeated = 0
    for question in ("Why is the sky blue?", "Is it so at night, when there is no sun?", "Are you sure?"):
        messages.append({"role": "user", "content": question})
        answer, usage = think(stack, messages, stack.key)
        uncached = think(stack, messages, KeyStore(stack.settings.keys_file).create(question, ["infer"]))
        assert answer == uncached[0]
        assert uncached[1]["cached_tokens"] == 0
        assert answer["reasoning_content"]
        assert answer["content"]
        assert repeated - 1 <= usage["cached_tokens"] <= repeated
        repeated = usage["prompt_tokens"] - opened
        messages.append(answer)
    assert repeated > MIN_TOKENS


def think(stack: Stack, messages: list[dict[str, Any]], key: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return an answer's message, in which the thoughts end after a few tokens, and its usage."""
    body = {"messages": messages, "temperature": 0, "max_tokens": 24, "parse": "message", "thinking_budget": 8}
    with Client(stack.url, key) as client:
        ended = finished(client, body)
        job = client.request("GET", f"/v1/jobs/{ended.id}").json()
    return job["message"], job["usage"]


def test_prefixes_of_windows_and_recurrent_layers_survive_a_kill(kind_stack: Stack) -> None:
    """A restarted worker finds at least four fifths of a prompt of 4,000 tokens."""
    stack, system = kind_stack, SYSTEM * 6
    first, before = stack.processes[-1], set(files(stack))
    key = KeyStore(stack.settings.keys_file).create("killed", ["infer"])
    job = ask(stack, "Is it so at night?", key, system)
    assert 4000 <= job.usage["prompt_tokens"] < 6000
    minimum = 0.8 * job.usage["prompt_tokens"]
    recurrent = "qwen3_5" in stack.model

    def written() -> bool:
        checkpoints = [file for file in set(files(stack)) - before if "-" in file.stem]
        blocks = len(files(stack)) - len(before) - len(checkpoints)
        return 128 * blocks >= minimum and bool(checkpoints) == recurrent

    eventually(written, "the prompt is on disk", 20)
    assert stack.stop(first, signal.SIGKILL) == -signal.SIGKILL
    stack.start_worker()
    again = ask(stack, "Is it so at night?", key, system)
    assert cached_tokens(again) >= minimum
    assert again.text == job.text


@pytest.mark.parametrize("variables", [{"PREFIX_DISK_BYTES": "0"}, {"PREFIX_CACHE_BYTES": "0"}], ids=str)
def test_no_files_are_written_if_prefixes_are_disabled(tiny_stack: Stack, variables: dict[str, Any]) -> None:
    stack = tiny_stack
    first = stack.start_worker(**variables)
    ask(stack, "Hi")
    ask(stack, "Hi")
    assert stack.stop(first) == 0
    assert not files(stack)


def test_prefixes_in_broken_files_are_recomputed_and_rewritten(tiny_stack: Stack) -> None:
    stack = tiny_stack
    first = stack.start_worker()
    job = ask(stack, "Hi")
    assert stack.stop(first) == 0
    for path in files(stack):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    second = stack.start_worker()
    again = ask(stack, "Hi")
    assert cached_tokens(again) < MIN_TOKENS
    assert again.text == job.text
    assert stack.stop(second) == 0
    assert "broken" in stack.log("worker-1")
    stack.start_worker()
    assert cached_tokens(ask(stack, "Hi")) >= MIN_TOKENS


def test_other_keys_reuse_only_shared_prefixes(tiny_stack: Stack) -> None:
    stack = tiny_stack
    other = KeyStore(stack.settings.keys_file).create("another", ["infer"])
    first = stack.start_worker()
    job = ask(stack, "Why is the sky blue?")
    assert cached_tokens(ask(stack, "Why is the sky blue?", other)) == 0
    assert stack.stop(first) == 0
    stack.start_worker()
    third = KeyStore(stack.settings.keys_file).create("third", ["infer"])
    assert cached_tokens(ask(stack, "Why is the sky blue?", third)) == 0
    ask(stack, "Is it so at night?", share_system_prompt=True)
    fourth = KeyStore(stack.settings.keys_file).create("fourth", ["infer"])
    shared = ask(stack, "Why is the sky blue?", fourth)
    assert MIN_TOKENS <= cached_tokens(shared) < shared.usage["prompt_tokens"] - 5
    assert shared.text == job.text
