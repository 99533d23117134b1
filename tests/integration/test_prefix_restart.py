"""Prefixes on disk, with real worker processes that are stopped, killed and restarted."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlx_lm")

import mlx.core as mx
from mlx.utils import tree_flatten

from scripts.client.api import Client, RemoteJob
from shared.jobs.record import Status
from tests.plugins.stack import Stack, made_stack
from tests.support.architecture_configs import config
from tests.support.architectures import make
from tests.support.waiting import eventually
from web.access.api_keys import KeyStore

SYSTEM = "You answer in few words and name your sources, whatever you are asked. " * 50
MIN_TOKENS = 5 * 128


def ask(stack: Stack, question: str, key: str = "", system: str = SYSTEM, **more: Any) -> RemoteJob:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    with Client(stack.url, key or stack.key) as client:
        job = client.submit({"messages": messages, "temperature": 0, "max_tokens": 4, **more}, wait_s=60)
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


@pytest.fixture(params=["gemma3_text", "qwen3_5"])
def kind_stack(request: pytest.FixtureRequest, tiny_model_path: Path, tmp_path: Path) -> Iterator[Stack]:
    """Only the API, for a tiny model with sliding windows or recurrent layers."""
    for stack in made_stack(folder_of(request.param, tmp_path / request.param, tiny_model_path), {"LEASE_S": "1"}):
        stack.start_web()
        yield stack


def test_prefixes_of_windows_and_recurrent_layers_survive_a_kill(kind_stack: Stack) -> None:
    """A restarted worker finds at least four fifths of a prompt of 4,000 tokens."""
    stack, system = kind_stack, SYSTEM * 6
    first = stack.start_worker()
    for question in ("Why is the sky blue?", "Is it so at night?"):
        job = ask(stack, question, system=system)
    assert 4000 <= job.usage["prompt_tokens"] < 6000
    minimum = 0.8 * job.usage["prompt_tokens"]
    recurrent = "qwen3_5" in stack.model

    def written() -> bool:
        checkpoints = [file for file in files(stack) if "-" in file.stem]
        return len(files(stack)) - len(checkpoints) >= minimum // 128 and bool(checkpoints) == recurrent

    eventually(written, "the reused prefix is on disk", 20)
    assert stack.stop(first, signal.SIGKILL) == -signal.SIGKILL
    stack.start_worker()
    again = ask(stack, "Is it so at night?", system=system)
    assert cached_tokens(again) >= minimum
    assert again.text == job.text


def folder_of(name: str, folder: Path, tiny_model_path: Path) -> Path:
    """Write a tiny model of an architecture with the tokenizer of the tiny llama."""
    folder.mkdir()
    for file in tiny_model_path.glob("*token*"):
        shutil.copy(file, folder)
    vocabulary = json.loads((tiny_model_path / "config.json").read_text())["vocab_size"]
    options = {"vocab_size": vocabulary, "max_position_embeddings": 8192}
    own = config(name) | options
    (folder / "config.json").write_text(json.dumps(own | {"text_config": own["text_config"] | options}))
    weights = dict(tree_flatten(make(name, **options).parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    return folder


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
