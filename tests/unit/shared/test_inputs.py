"""The stored form of inputs and of their results."""

from __future__ import annotations

import base64
import struct

import pytest

from shared.jobs.inputs import Input, numbers, pack_inputs, result_bytes, result_line, result_lines, unpack_inputs
from shared.jobs.request import EMBED, RERANK, Request, Sampling, pack_tokens, unpack_tokens
from shared.models.registry import ModelCard

INPUTS = (Input((5, 6, 7), 2), Input((8,)), Input((2**31, 0)))


def test_inputs_survive_the_record() -> None:
    assert unpack_inputs(unpack_tokens(pack_tokens(pack_inputs(INPUTS)))) == INPUTS


@pytest.mark.parametrize("packed", [(), (0,), (2, 1, 0), (1, 2, 0, 5), (1, 1, 0, 5, 6), (9, 9)])
def test_other_token_ids_are_no_inputs(packed: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="token ids of inputs"):
        unpack_inputs(packed)


def test_results_are_read_from_the_complete_lines_of_a_text() -> None:
    encoded = base64.b64encode(struct.pack("<2f", 0.5, -2.0)).decode()
    text = result_line(3, encoded) + result_line(0, "AAAA") + "1:" + encoded
    assert result_lines(text) == {3: encoded, 0: "AAAA"}
    assert list(numbers(encoded)) == [0.5, -2.0]


def test_lines_are_not_longer_than_reserved() -> None:
    for count in (1, 2, 3, 384, 4096):
        line = result_line(2047, base64.b64encode(bytes(4 * count)).decode())
        assert len(line) <= result_bytes([count])


def test_requests_survive_the_record() -> None:
    embed = Request("m", 0, Sampling(0.0), kind=EMBED, inputs=("a", "b"), dimensions=8, truncate=True, prompt_name="q")
    tokens = Request("m", 0, Sampling(0.0), kind=EMBED, inputs=((1, 2), (3,)))
    rerank = Request("m", 0, Sampling(0.0), kind=RERANK, inputs=("a",), query="q", instruction="i")
    for request in (embed, tokens, rerank):
        assert Request.from_json(request.to_json()) == request


def test_cards_of_embedding_models_survive_the_registry() -> None:
    card = ModelCard("m", EMBED, 512, dimensions=8, prompts={"query": "Query: "}, default_prompt="query")
    assert ModelCard.from_json(card.to_json()) == card
