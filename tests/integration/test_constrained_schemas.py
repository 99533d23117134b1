"""Answers for schemas of every kind, many in a batch: each that ends by itself satisfies its schema."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import jsonschema
import pytest

pytest.importorskip("mlx_lm")

from shared.jobs.request import Constraint, Request, Sampling
from tests.support.runner import plan
from tests.support.schemas import SCHEMAS
from worker.models.load import LoadedModel, load_model
from worker.runner.base import Row
from worker.runner.memory import Memory
from worker.runner.model_runner import MLXRunner

BATCH = 32
FORMATS = jsonschema.FormatChecker(["date", "uuid", "ipv4", "email"])  # that of `time` knows not all of RFC 3339


class Answers:
    """Generates answers in a full batch.

    Attributes:
        ends: number of answers by how they ended.
        cut: number of answers that reached the token limit, by schema.
    """

    def __init__(self, model: LoadedModel, max_new_tokens: int) -> None:
        self.ends: Counter[str] = Counter()
        self.cut: Counter[str] = Counter()
        self._model = model
        self._runner = MLXRunner(model, 32, Memory(4 * 2**30, 2**28))
        self._max_new_tokens = max_new_tokens
        self._uids = count(1)

    def run(self, repeats: int) -> None:
        """Generate `repeats` answers for each schema and check them."""
        pending = self._rows(repeats)
        names: dict[int, str] = {}
        tokens: dict[int, list[int]] = {}
        while True:
            while len(tokens) < BATCH and (named := next(pending, None)) is not None:
                name, row = named
                names[row.uid], tokens[row.uid] = name, []
                self._runner.insert([row])
            if not tokens:
                return
            output = self._runner.execute(plan(self._runner))
            assert not output.failed
            for each in output.tokens:
                if each.uid not in tokens:
                    continue
                tokens[each.uid].append(each.token)
                if each.token in self._model.eos or len(tokens[each.uid]) == self._max_new_tokens:
                    self._runner.remove([each.uid])
                    self._check(names[each.uid], tokens.pop(each.uid))

    def _rows(self, repeats: int) -> Iterator[tuple[str, Row]]:
        for seed in range(repeats):
            for name, schema in SCHEMAS.items():
                yield name, self._row(schema, seed)

    def _row(self, schema: object, seed: int) -> Row:
        sampling = Sampling(0.8 if seed else 0.0, seed=seed)
        source = json.dumps(schema, ensure_ascii=False)
        request = Request("m", self._max_new_tokens, sampling, constraint=Constraint("json_schema", source))
        text = f"Give an example of JSON that satisfies this schema: {source[:400]}"
        messages = [{"role": "user", "content": text}]
        ids = self._model.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        prompt = self._runner.prompt(ids, 0, request, {})
        return Row(
            next(self._uids), request, prompt.tokens, 0, self._max_new_tokens, "me", constraint=prompt.constraint
        )

    def _check(self, name: str, tokens: list[int]) -> None:
        if tokens[-1] not in self._model.eos:
            self.ends["length"] += 1
            self.cut[name] += 1
            return
        self.ends["stop"] += 1
        answer = self._model.tokenizer.decode(tokens[:-1])
        jsonschema.validate(json.loads(answer), SCHEMAS[name], format_checker=FORMATS)


def test_there_are_enough_schemas() -> None:
    assert len(SCHEMAS) >= 60
    for schema in SCHEMAS.values():
        jsonschema.Draft202012Validator.check_schema(schema)


def test_answers_of_a_random_model_satisfy_their_schemas(tiny_model_path: Path) -> None:
    answers = Answers(load_model(tiny_model_path), 150)
    answers.run(2)
    assert answers.ends["stop"] > answers.ends["length"]


@pytest.mark.long
def test_answers_satisfy_their_schemas_and_end(smollm2_path: Path) -> None:
    answers = Answers(load_model(smollm2_path), 400)
    answers.run(32)
    assert answers.ends.total() == 32 * len(SCHEMAS)
    assert answers.ends["length"] <= 0.05 * answers.ends.total(), answers.cut
