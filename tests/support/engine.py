"""Runs jobs through an engine on a real model, with prompts tokenised as in a worker's tokenizer process."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from shared.queue.claims import ClaimedJob
from shared.tokenizing.chat_tokenizer import ChatTokenizer, tokenize
from shared.tokenizing.messages import Tokenized, TokenizerSource, request_fields
from worker.engine.core import EngineCore
from worker.engine.sequence import Sequence, SequenceOutput
from worker.models.tokenizer_helper import load_tokenizer
from worker.runner.base import ModelRunner


def tokenized(folder: Path, claimed: ClaimedJob) -> Tokenized:
    """Tokenise a job's prompt with the tokenizer of a model folder."""
    tokens, shared = tokenize(_encoder(folder), request_fields(claimed.request))
    return Tokenized(tuple(tokens), shared)


def sequence_of(folder: Path, claimed: ClaimedJob, runner: ModelRunner) -> Sequence:
    """Return a job as a sequence for the engine."""
    prompt = tokenized(folder, claimed)
    return Sequence(claimed, runner.prompt(prompt.tokens, prompt.shared, claimed.request, {}), runner)


def run(runner: ModelRunner, sequences: Iterable[Sequence], slots: int = 8) -> dict[Sequence, str]:
    """Submit all sequences at once, run them, and return the text of each."""
    published: list[SequenceOutput] = []
    core = EngineCore(lambda: runner, slots, published.extend)
    core.load()
    texts = dict.fromkeys(sequences, "")
    for sequence in texts:
        core.submit(sequence)
    core.step()
    while core.busy:
        core.step()
    for output in published:
        texts[output.sequence] += output.text
    return texts


@lru_cache
def _encoder(folder: Path) -> ChatTokenizer:
    return load_tokenizer(TokenizerSource(str(folder)))
