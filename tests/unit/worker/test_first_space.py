"""The first space of an answer: in the texts of tokens, in stop strings, and after a takeover."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer

from shared.jobs.log import Written
from shared.jobs.record import Status
from tests.plugins.work import claimed, sequence_for, text_of
from tests.unit.worker.test_detokenizer import TOKENIZERS
from worker.engine.output import OutputProcessor, ReplayError
from worker.engine.sequence import Sequence, SequenceOutput
from worker.runner.base import Detokenizer, TokenOutput
from worker.runner.detokenizer import make_detokenizer

EOS = 10**6
SPACED = ["SmolLM2", "byte level", "byte level in a sequence"]
"""Tokenizers of which an answer may begin with a space."""
TEXTS = [" Paris.", "Paris.", "  a b", "The capital of France is Paris."]


class Answer:
    """An answer with these tokens, and the processor that publishes it."""

    def __init__(self, tokenizer: Tokenizer, text: str, **request: Any) -> None:
        self.tokenizer = tokenizer
        self.tokens = tokenizer.encode(text, add_special_tokens=False).ids
        self.request = {"max_tokens": len(self.tokens) + 5, **request}
        self.processor = OutputProcessor(frozenset({EOS}), self.detokenizer)

    def detokenizer(self) -> Detokenizer:
        return make_detokenizer(SimpleNamespace(backend_tokenizer=self.tokenizer))

    def sequence(self, **more: Any) -> Sequence:
        sequence = sequence_for(claimed(**self.request, **more))
        sequence.detokenizer = self.detokenizer()
        return sequence

    def run(self, sequence: Sequence, tokens: list[int]) -> list[SequenceOutput]:
        published = []
        for token in tokens:  # one step each
            output = TokenOutput(sequence.uid, token, -1.0, ((token, -1.0),))
            published += self.processor.process({sequence.uid: sequence}, [output])
        return published

    def whole(self) -> list[SequenceOutput]:
        return self.run(self.sequence(), [*self.tokens, EOS])


@pytest.mark.parametrize("text", [*TEXTS, "Paris Paris Paris"])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_texts_of_tokens_with_log_probabilities_add_up_to_the_answer(kind: str, text: str) -> None:
    answer = Answer(TOKENIZERS[kind], text, logprobs=1)
    sequence = answer.sequence()
    published = answer.run(sequence, [*answer.tokens, EOS])
    entries = [sequence.describe_logprob(output) for each in published for output in each.outputs]
    assert len(entries) == len(answer.tokens)
    assert "".join(entry["token"] for entry in entries) == text_of(published)
    assert all(entry["token"] == entry["top"][0]["token"] for entry in entries)


@pytest.mark.parametrize("cut", [0, 1, 2])
@pytest.mark.parametrize(("text", "stop", "expected"), [
    (" Paris. It", " Paris", ""), (" Paris. It", " ", ""), (" Paris. It", ". It", " Paris"),
    ("Paris is in", " is", "Paris"), ("Paris is in", " Paris", "Paris is in"),
])  # fmt: skip
@pytest.mark.parametrize("kind", SPACED)
def test_a_stop_string_may_begin_with_a_space(kind: str, text: str, stop: str, expected: str, cut: int) -> None:
    """Also if another worker continues after the first `cut` tokens."""
    answer = Answer(TOKENIZERS[kind], text, stop=(stop,))
    first = answer.sequence()
    before = answer.run(first, answer.tokens[:cut])
    if first.ending is not None:
        assert text_of(before) == expected
        return
    written = Written(text_of(before), tuple(token for each in before for token in each.tokens), 2 + len(before))
    second = answer.sequence(attempt=2)
    assert answer.processor.replay(second, written) is None
    after = answer.run(second, [*answer.tokens[len(written.tokens) :], EOS])
    assert text_of(before) + text_of(after) == expected
    assert second.ending is not None and second.ending.status is Status.SUCCEEDED


@pytest.mark.parametrize("stop", [(), ("!!",)])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", SPACED)
def test_an_answer_of_the_previous_version_is_continued(kind: str, text: str, stop: tuple[str, ...]) -> None:
    """The previous version trimmed the first space. The continued text has no space twice and lacks none."""
    answer = Answer(TOKENIZERS[kind], text, stop=stop)
    published = [each for each in answer.whole() if each.tokens]
    for cut in range(1, len(published) + 1):
        tokens = tuple(token for each in published[:cut] for token in each.tokens)
        trimmed = text_of(published[:cut]).removeprefix(" ")
        retry = answer.sequence(attempt=2)
        assert answer.processor.replay(retry, Written(trimmed, tokens, 2 + cut)) is None
        after = answer.run(retry, [*answer.tokens[len(tokens) :], EOS])
        assert trimmed + text_of(after) == text.removeprefix(" ")


def test_an_answer_that_differs_in_more_than_the_first_space_is_rejected() -> None:
    answer = Answer(TOKENIZERS["SmolLM2"], "  a b")
    with pytest.raises(ReplayError):
        answer.processor.replay(answer.sequence(attempt=2), Written("a b", tuple(answer.tokens), 5))
