"""The parts of scripts/batch: reading prompts, continuing a results file, keeping order, being patient."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from scripts.commands.batching import plan
from scripts.commands.batching.patience import FAULTS, GaveUp, Patience, Stopped
from scripts.commands.batching.prompts import Malformed, Prompt, read_prompts
from scripts.commands.batching.results import NotOurs, Result, ResultFile, in_order
from scripts.commands.client import Refused, Unreachable


@pytest.fixture
def prompts(tmp_path: Path) -> Callable[..., list[Prompt | Malformed]]:
    """Writes lines to a file and reads them."""

    def read(*lines: str | bytes, run: str = "", **defaults: object) -> list[Prompt | Malformed]:
        path = tmp_path / "prompts.jsonl"
        path.write_bytes(b"\n".join(line.encode() if isinstance(line, str) else line for line in lines))
        return list(read_prompts(path, defaults, run))

    return read


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "results.jsonl"


def result(prompt: Prompt, *, status: str = "succeeded", text: str = "yes", job: str = "job_1") -> Result:
    return Result(prompt.line, prompt.custom_id, job, status, prompt.digest, text)


def some(count: int) -> list[Prompt]:
    return [Prompt(line, None, {"prompt": str(line)}, f"{line:032x}"[::-1]) for line in range(1, count + 1)]


def lines_of(path: Path) -> list[int]:
    return [json.loads(line)["line"] for line in path.read_text().splitlines()]


def ignore(_: Malformed) -> None:
    pass


# Prompts


def test_objects_and_strings_are_requests_and_empty_lines_are_nothing(prompts) -> None:
    first, second = prompts('\ufeff{"prompt": "a", "seed": 7}', "", "   ", '"b"', max_tokens=5)
    assert (first.line, first.body) == (1, {"prompt": "a", "seed": 7, "max_tokens": 5})
    assert (second.line, second.body) == (4, {"prompt": "b", "max_tokens": 5})


def test_a_line_wins_over_the_defaults(prompts) -> None:
    (prompt,) = prompts('{"prompt": "a", "max_tokens": 1}', max_tokens=5)
    assert prompt.body["max_tokens"] == 1


@pytest.mark.parametrize(
    ("fields", "name"),
    [({"id": "a"}, "a"), ({"custom_id": "b"}, "b"), ({"id": 7}, "7"), ({"id": "a", "custom_id": "b"}, "b"), ({}, None)],
)
def test_a_name_is_kept_here_and_not_sent(prompts, fields: dict[str, object], name: str | None) -> None:
    (prompt,) = prompts(json.dumps({"prompt": "x", **fields}))
    assert prompt.custom_id == name
    assert prompt.body == {"prompt": "x"}


@pytest.mark.parametrize(
    "line",
    [
        "{",
        b'"\xff"',
        "[1]",
        "7",
        "{}",
        '{"messsages": []}',
        '{"prompt": "a", "temperature": NaN}',
        '{"prompt": "a", "id": [1]}',
        '{"prompt": "a", "id": true}',
        '{"prompt": ' + "[" * 100_000,
    ],
)
def test_what_cannot_be_sent_is_reported_and_the_next_line_goes_on(prompts, line: str | bytes) -> None:
    bad, good = prompts(line, '"fine"')
    assert isinstance(bad, Malformed)
    assert bad.line == 1
    assert bad.reason
    assert good.line == 2


def test_the_same_line_has_the_same_key_and_every_line_its_own(prompts) -> None:
    once = [prompt.digest for prompt in prompts('"a"', '"a"', '"b"')]
    again = [prompt.digest for prompt in prompts('"a"', '"a"', '"b"')]
    assert once == again
    assert len(set(once)) == 3


def test_other_options_and_another_run_make_other_keys(prompts) -> None:
    variants = [prompts('"a"'), prompts('"a"', seed=1), prompts('"a"', run="second"), prompts('{"prompt":"a","id":1}')]
    assert len({prompt.digest for (prompt,) in variants}) == len(variants)


# The results file


def test_a_result_is_read_as_it_was_written(output: Path) -> None:
    written = Result(3, "n\udc80", "job_1", "failed", "0f" * 16, "é\u2028\n", "stop", {"a": 1}, {}, {"code": "x"})
    assert Result.from_line(written.to_line()) == written
    assert b"actions" not in written.to_line()
    parsed = replace(written, actions=[{"action": "wait"}])
    assert Result.from_line(parsed.to_line()) == parsed
    assert written.to_line().count(b"\n") == 1


def test_a_continued_run_does_what_is_missing(output: Path) -> None:
    prompts = some(5)
    with ResultFile(output) as results:
        for prompt in (prompts[3], prompts[0]):
            results.append(result(prompt))
    with ResultFile(output) as results:
        tally = plan.survey(prompts, results.index, retry_failed=False, report=ignore)
        missing = [task.prompt.line for task in plan.tasks(prompts, results, retry_failed=False)]
    assert (tally.total, tally.done) == (5, 2)
    assert missing == [2, 3, 5]


def test_every_torn_tail_is_mended(output: Path) -> None:
    first, second = some(2)
    with ResultFile(output) as results:
        results.append(result(first))
        whole = output.stat().st_size
        results.append(result(second, text="é" * 10))
    content = output.read_bytes()
    for cut in range(whole, len(content)):
        output.write_bytes(content[:cut])
        with ResultFile(output) as results:
            assert results.index.has(first)
            assert not results.index.has(second)
            results.append(result(second, text="é" * 10))
        assert output.read_bytes() == content


@pytest.mark.parametrize(
    "content", ["precious notes", "precious notes\n", '{"line": 1}\n', '{"line": "1"}\n', '"a"\n', "[]\n", "\xff\n"]
)
def test_a_file_of_something_else_is_refused_and_left_alone(output: Path, content: str) -> None:
    output.write_text(content, encoding="latin-1")
    with pytest.raises(NotOurs, match="line 1"):
        ResultFile(output)
    assert output.read_text(encoding="latin-1") == content


def test_results_of_other_prompts_are_refused(output: Path, prompts) -> None:
    with ResultFile(output) as results:
        results.append(result(prompts('"a"')[0]))
        with pytest.raises(NotOurs, match="another request for line 1"):
            plan.survey(prompts('"b"'), results.index, retry_failed=False, report=ignore)


def test_results_of_more_prompts_are_refused(output: Path) -> None:
    with ResultFile(output) as results:
        for prompt in some(3):
            results.append(result(prompt))
        with pytest.raises(NotOurs, match="do not have"):
            plan.survey(some(2), results.index, retry_failed=False, report=ignore)


def test_two_runs_do_not_write_one_file(output: Path) -> None:
    with ResultFile(output), pytest.raises(NotOurs, match="another run"):
        ResultFile(output)


def test_failures_stay_unless_they_are_to_be_retried(output: Path) -> None:
    prompts = some(3)
    with ResultFile(output) as results:
        results.append(result(prompts[0], status="failed", job="job_lost"))
        results.append(result(prompts[1]))
        left = plan.survey(prompts, results.index, retry_failed=False, report=ignore)
        retried = plan.survey(prompts, results.index, retry_failed=True, report=ignore)
        first, last = plan.tasks(prompts, results, retry_failed=True)
        again, _ = plan.tasks(prompts, results, retry_failed=True)
    assert (left.done, left.failed) == (2, 1)
    assert (retried.done, retried.failed) == (1, 0)
    assert first.key != prompts[0].digest
    assert first.key == again.key
    assert last.key == prompts[2].digest


def test_a_retry_takes_the_place_of_the_failure(output: Path) -> None:
    prompts = some(3)
    with ResultFile(output) as results:
        for prompt in (prompts[2], prompts[0], prompts[1]):
            results.append(result(prompt, status="failed", text=""))
        results.append(result(prompts[0], text="at last"))
        results.tidy(in_order=False)
    assert lines_of(output) == [1, 2, 3]
    assert json.loads(output.read_text().splitlines()[0])["text"] == "at last"
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_the_file_is_put_in_order_only_when_asked(output: Path) -> None:
    prompts = some(3)
    with ResultFile(output) as results:
        for prompt in reversed(prompts):
            results.append(result(prompt))
        results.tidy(in_order=False)
        assert lines_of(output) == [3, 2, 1]
        results.tidy(in_order=True)
    assert lines_of(output) == [1, 2, 3]


def test_early_results_wait_for_their_turn() -> None:
    def arriving() -> Iterator[tuple[int, Result]]:
        for place in (2, 0, 1, 4, 3):
            yield place, result(prompts[place])

    prompts = some(5)
    assert [each.line for each in in_order(arriving())] == [1, 2, 3, 4, 5]


# Patience


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scripts.commands.batching.patience.FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr("scripts.commands.batching.patience.LONGEST_PAUSE_S", 0.001)


def answers(*outcomes: Exception | str) -> Callable[[], str]:
    """A request that has these outcomes, one after the other."""
    remaining = iter(outcomes)

    def request() -> str:
        outcome = next(remaining)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return request


@pytest.mark.usefixtures("quick")
def test_passing_troubles_are_waited_out_and_the_limit_is_told() -> None:
    limited: list[None] = []
    patience = Patience(60, threading.Event(), on_limited=lambda: limited.append(None))
    troubles = [Unreachable("gone"), Refused(503, "unavailable", ""), Refused(429, "", "", 0.001), Refused(502, "", "")]
    assert patience.call(answers(*troubles, "done")) == "done"
    assert len(limited) == 1


@pytest.mark.usefixtures("quick")
def test_an_answer_that_stays_is_raised_at_once() -> None:
    with pytest.raises(Refused, match="too long"):
        Patience(60, threading.Event()).call(answers(Refused(422, "invalid_request", "too long")))


@pytest.mark.usefixtures("quick")
def test_an_internal_error_is_the_answer_after_some_times() -> None:
    with pytest.raises(Refused):
        Patience(60, threading.Event()).call(answers(*[Refused(500, "internal", "")] * FAULTS))


@pytest.mark.usefixtures("quick")
def test_an_absence_ends_and_a_full_queue_does_not() -> None:
    patience = Patience(0, threading.Event())
    full = [Refused(503, "queue_full", "", 0.001)] * 5
    assert patience.call(answers(*full, "done")) == "done"
    with pytest.raises(GaveUp, match="gone"):
        patience.call(answers(*[Unreachable("gone")] * 3))


def test_who_waits_is_told_to_stop() -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        Patience(60, stop).call(answers("never asked"))
