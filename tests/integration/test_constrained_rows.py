"""Constrained rows in a real batch: valid answers, free neighbours unchanged, exact continuation, isolated failures."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlx_lm")

from shared.errors import JobFailure, PromptRefused
from shared.jobs.request import Constraint, Request, Sampling
from tests.support.runner import GREEDY, alone, numbered, resumed, step
from worker.models.load import LoadedModel, load_model
from worker.runner.base import ConstraintFailed, Row
from worker.runner.memory import Memory
from worker.runner.model_runner import MLXRunner

PERSON = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["person", "robot"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "name": {"type": "string", "maxLength": 8},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["kind", "age", "name", "tags"],
    "additionalProperties": False,
}
SAMPLED = Sampling(1.0, seed=5)


@pytest.fixture(scope="module")
def tiny(tiny_model_path: Path) -> LoadedModel:
    return load_model(tiny_model_path)


@pytest.fixture
def runner(tiny: LoadedModel) -> MLXRunner:
    return MLXRunner(tiny, 16, Memory(2**30, 2**28), speculation_tokens=8)


def constrained(
    runner: MLXRunner, uid: int, constraint: Constraint, sampling: Sampling = SAMPLED, max_new_tokens: int = 120
) -> Row:
    """Return a row with a constraint, as the engine would make it."""
    base = numbered(uid, 9 + uid, max_new_tokens)
    request = Request("m", max_new_tokens, sampling, constraint=constraint)
    prompt = runner.prompt(base.prompt, 0, request, {})
    return replace(base, request=request, constraint=prompt.constraint)


def answers(runner: MLXRunner, rows: Sequence[Row], *, ahead: bool = True) -> dict[int, list[int]]:
    """Step until every row has ended; return the tokens by uid, with the end token."""
    tokens: dict[int, list[int]] = defaultdict(list)
    running = {row.uid: row for row in rows}
    runner.insert(rows)
    while running:
        output = step(runner, ahead=ahead)
        assert not output.failed
        for each in output.tokens:
            if (row := running.get(each.uid)) is None:
                continue
            tokens[each.uid].append(each.token)
            if each.token in runner.eos or len(tokens[each.uid]) == row.max_new_tokens:
                del running[each.uid]
                runner.remove([each.uid])
    return tokens


def text(tiny: LoadedModel, tokens: Sequence[int]) -> str:
    """Decode an answer, which must have ended by itself."""
    assert tokens[-1] in tiny.eos
    return str(tiny.tokenizer.decode(tokens[:-1]))


CONSTRAINTS = {
    "schema": Constraint("json_schema", json.dumps(PERSON)),
    "regex": Constraint("regex", r"[a-f]{3}-\d{4}"),
    "choice": Constraint("choice", json.dumps(["yes", "no", "it “depends”\n"])),
    "grammar": Constraint("grammar", 'start: "<" NUMBER ("," NUMBER)~2 ">"\nNUMBER: /[0-9]{1,3}/'),
}


def check(name: str, answer: str) -> None:
    import re

    match name:
        case "schema":
            value: dict[str, Any] = json.loads(answer)
            assert list(value) == ["kind", "age", "name", "tags"]
            assert value["kind"] in ("person", "robot")
            assert 0 <= value["age"] <= 150
            assert len(value["name"]) <= 8
            assert len(value["tags"]) <= 3
        case "regex":
            assert re.fullmatch(r"[a-f]{3}-\d{4}", answer)
        case "choice":
            assert answer in ("yes", "no", "it “depends”\n")
        case "grammar":
            assert re.fullmatch(r"<\d{1,3}(,\d{1,3}){2}>", answer)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_every_answer_satisfies_its_constraint(tiny: LoadedModel, runner: MLXRunner, sampling: Sampling) -> None:
    names = list(CONSTRAINTS) * 4
    rows = [constrained(runner, uid, CONSTRAINTS[name], replace(sampling, seed=uid)) for uid, name in enumerate(names)]
    results = answers(runner, rows)
    for uid, name in enumerate(names):
        check(name, text(tiny, results[uid]))


def test_rows_in_company_generate_what_they_generate_alone(runner: MLXRunner) -> None:
    constraints = [constrained(runner, uid, each) for uid, each in enumerate(CONSTRAINTS.values())]
    free = [numbered(uid, 5 * uid, 40, Sampling(0.8, seed=uid)) for uid in range(10, 13)]
    rows = [constraints[0], free[0], *constraints[1:], *free[1:]]
    together = answers(runner, rows)
    assert answers(runner, rows, ahead=False) == together
    for row in (*constraints, *free):
        assert together[row.uid] == answers(runner, [replace(row, uid=row.uid + 100)])[row.uid + 100]


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_a_resumed_answer_is_the_same(runner: MLXRunner, name: str) -> None:
    row = constrained(runner, 1, CONSTRAINTS[name])
    whole = answers(runner, [row])[1]
    for cut in range(1, len(whole)):
        rest = answers(runner, [resumed(row, 2, whole[:cut])])[2]
        assert whole[:cut] + rest == whole, cut


def test_white_space_is_bounded(tiny: LoadedModel, runner: MLXRunner) -> None:
    """Even if white space is by far the most likely text."""
    spaces = tuple((token, 100.0) for token in range(49152) if not tiny.tokenizer.decode([token]).strip())
    assert spaces
    row = constrained(runner, 1, CONSTRAINTS["schema"], max_new_tokens=400)
    row = replace(row, request=replace(row.request, logit_bias=spaces))
    check("schema", text(tiny, answers(runner, [row])[1]))


def test_a_row_whose_constraint_fails_does_not_affect_the_others(runner: MLXRunner) -> None:
    free = numbered(1, 12, 20, SAMPLED)
    expected = alone(runner, replace(free, uid=9))
    bad = constrained(runner, 2, CONSTRAINTS["regex"])
    bad = resumed(bad, 2, [5])  # a token that the grammar does not allow, as from another model's log
    good = constrained(runner, 3, CONSTRAINTS["choice"])
    runner.insert([free, bad, good])
    tokens: dict[int, list[int]] = defaultdict(list)
    failed = []
    while len(tokens[1]) < 20:
        output = step(runner)
        failed += output.failed
        for each in output.tokens:
            tokens[each.uid].append(each.token)
    assert [uid for uid, _ in failed] == [2]
    assert isinstance(failed[0][1], ConstraintFailed)
    assert not tokens[2]
    assert tokens[1] == expected
    assert any(token in runner.eos for token in tokens[3])


@pytest.mark.parametrize(
    ("constraint", "part"),
    [
        (Constraint("json_schema", '{"type": "string", "nullable": true}'), "response_format.json_schema.schema"),
        (Constraint("json_schema", '{"type": "strin'), "response_format.json_schema.schema"),
        (Constraint("regex", "(?=a)b"), "look-around"),
        (Constraint("grammar", "start: nothing"), "nothing"),
        (Constraint("xml"), "response_format"),
    ],
)
def test_a_constraint_that_cannot_be_honoured_is_refused(runner: MLXRunner, constraint: Constraint, part: str) -> None:
    with pytest.raises(PromptRefused) as refused:
        constrained(runner, 1, constraint)
    assert refused.value.code == JobFailure.CONSTRAINT
    assert part in str(refused.value)


@pytest.mark.parametrize("bias", [100.0, -100.0])
def test_logit_bias_forces_and_bans_tokens(runner: MLXRunner, bias: float) -> None:
    plain = numbered(1, 20, 10)
    first = alone(runner, plain)
    token = 777 if bias > 0 else first[0]
    others = [numbered(2, 7, 10), numbered(3, 30, 10)]
    expected = [alone(runner, replace(each, uid=each.uid + 10)) for each in others]
    biased = replace(plain, request=replace(plain.request, logit_bias=((token, bias), (5, -1.0))))
    other = replace(others[1], request=replace(others[1].request, logit_bias=((6, 0.0),)))
    tokens: dict[int, list[int]] = defaultdict(list)
    runner.insert([biased, others[0], other])
    while any(len(tokens[uid]) < 10 for uid in (1, 2, 3)):
        for each in step(runner).tokens:
            tokens[each.uid].append(each.token)
    assert tokens[1] == [token] * 10 if bias > 0 else token not in tokens[1]
    assert [tokens[2], tokens[3]] == expected
