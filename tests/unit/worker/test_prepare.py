"""A claimed job gets its prompt, or fails in one of several ways."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from shared.errors import PromptRefused
from shared.jobs.inputs import Input, pack_inputs
from shared.jobs.log import JobLog
from shared.jobs.request import EMBED, Constraint, Request, Sampling
from shared.jobs.store import Jobs
from shared.jobs.submission import Submission
from shared.models.registry import ModelCard
from shared.queue.claims import ClaimedJob
from shared.redis import keys
from shared.redis.client import Redis
from shared.settings import Settings
from shared.tokenizing.client import TokenizerBusy, TokenizerError, Tokenizing
from shared.tokenizing.messages import TokenizerSource
from tests.support.fake_redis import FakeRedis
from tests.support.tokenizers import CHATML, HARM, chat, plain, written
from worker.queue.prepare import Preparer, TryLater
from worker.runner.base import Prompt


@dataclass
class StubRunner:
    """A runner that accepts any prompt, and may have tokens of its own."""

    own: list[int] | None = None
    error: Exception | None = None
    card: ModelCard = field(default_factory=lambda: ModelCard("m", "text", 100))
    images: Mapping[str, bytes] = field(default_factory=dict)

    def tokenize(self, request: Request) -> list[int] | None:
        return self.own

    def prompt(self, tokens: Sequence[int], shared: int, request: Request, images: Mapping[str, bytes]) -> Prompt:
        self.images = images
        if self.error:
            raise self.error
        return Prompt(tuple(tokens), shared)


class Harness:
    """A preparer and the stores that it reads."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.redis: Redis = FakeRedis()
        self.jobs = Jobs(self.redis, settings)
        self.tokenizing = Tokenizing(2.0)
        self.path = str(written(folder))
        self.sources = [TokenizerSource(self.path, chat_template=CHATML)]
        self.images: dict[str, bytes] = {}
        self.preparer = Preparer(self.tokenizing, lambda: self.sources, self.stored_images, JobLog(self.redis))

    def stored_images(self, job_id: str, digests: Any) -> Mapping[str, bytes]:
        return {digest: self.images[digest] for digest in digests if digest in self.images}

    def claimed(
        self, request: Request, attempt: int = 1, tokens: tuple[int, ...] | None = None, shared: int = 0
    ) -> ClaimedJob:
        job = self.jobs.create(Submission(request, "me")).job
        return ClaimedJob(replace(job, attempt=attempt), request, tokens, shared, rank=0.0, age_s=0.0)

    def failure(self, claimed: ClaimedJob, runner: StubRunner | None = None) -> tuple[str, str]:
        with pytest.raises(PromptRefused) as caught:
            self.preparer.prepare(claimed, runner or StubRunner())
        return caught.value.code, str(caught.value)


@pytest.fixture
def harness(settings: Settings, tmp_path: Path) -> Iterator[Harness]:
    harness = Harness(settings, tmp_path)
    with harness.tokenizing:
        yield harness


def test_stored_tokens_are_used(harness: Harness) -> None:
    prepared = harness.preparer.prepare(harness.claimed(plain("word"), tokens=(7, 8), shared=1), StubRunner(own=[9]))
    assert (prepared.prompt, prepared.written) == (Prompt((7, 8), 1), None)
    assert harness.tokenizing._short._helper is None


def test_stored_tokens_that_the_model_does_not_have_are_refused(harness: Harness) -> None:
    runner = StubRunner(card=ModelCard("m", "text", 100, vocabulary=8))
    assert harness.preparer.prepare(harness.claimed(plain("word"), tokens=(7,)), runner).prompt == Prompt((7,))
    code, message = harness.failure(harness.claimed(plain("word"), tokens=(7, 8)), runner)
    assert code == "template_error" and "token id 8; the model's ids are 0 to 7" in message


def test_an_adapter_that_the_worker_cannot_use_is_refused_by_name(harness: Harness) -> None:
    runner = StubRunner(own=[9], card=ModelCard("m", "text", 100, adapters={"good": "", "odd": "its rank is 99"}))
    prepared = harness.preparer.prepare(harness.claimed(replace(plain("word"), adapter="good")), runner)
    assert prepared.prompt == Prompt((9,))
    for name, reason in (("odd", "its rank is 99"), ("none", "the worker does not have it")):
        code, message = harness.failure(harness.claimed(replace(plain("word"), adapter=name)), runner)
        assert (code, message) == ("adapter_error", f"adapter: {name} cannot be used with m: {reason}.")


def test_a_runner_may_tokenise(harness: Harness) -> None:
    assert harness.preparer.prepare(harness.claimed(plain("word")), StubRunner(own=[9])).prompt == Prompt((9,))
    assert harness.tokenizing._short._helper is None


def test_otherwise_a_helper_tokenises(harness: Harness) -> None:
    system = {"role": "system", "content": "word"}
    claimed = harness.claimed(chat(system, "word", share=True))
    assert harness.preparer.prepare(claimed, StubRunner()).prompt == Prompt((4, 0, 3, 0, 5), 2)


@pytest.mark.parametrize("broken", ["gone.json", "broken.json"])
def test_the_next_source_is_used_if_one_does_not_work(harness: Harness, tmp_path: Path, broken: str) -> None:
    (tmp_path / "broken.json").write_text("{}")
    harness.sources.insert(0, TokenizerSource(str(tmp_path / broken)))
    assert harness.preparer.prepare(harness.claimed(plain("word")), StubRunner()).prompt == Prompt((2, 0))
    del harness.sources[1]
    with pytest.raises(TokenizerError):
        harness.preparer.prepare(harness.claimed(plain("word")), StubRunner())


@pytest.mark.parametrize("harm", ["endless", "huge", "talkative"])
def test_a_harmful_template_fails_its_job(harness: Harness, harm: str) -> None:
    harness.sources = [TokenizerSource(harness.path, chat_template=HARM[harm])]
    assert harness.failure(harness.claimed(chat("word")))[0] == "template_error"


def test_a_prompt_longer_than_the_context_fails_its_job(harness: Harness) -> None:
    code, message = harness.failure(harness.claimed(plain("word " * 99)))
    assert code == "context_length_exceeded" and "100 tokens" in message


def test_images_are_passed_to_the_runner(harness: Harness) -> None:
    harness.images["a"] = b"png"
    image = {"type": "image", "image": "a", "width": 8, "height": 8}
    claimed = harness.claimed(chat({"role": "user", "content": [image, image]}), tokens=(1,))
    runner = StubRunner()
    harness.preparer.prepare(claimed, runner)
    assert runner.images == {"a": b"png"}
    harness.images.clear()
    assert harness.failure(claimed)[0] == "image_lost"


def test_the_output_of_earlier_attempts_is_read(harness: Harness) -> None:
    claimed = harness.claimed(plain("word"), attempt=2, tokens=(1,))
    written_before = harness.preparer.prepare(claimed, StubRunner()).written
    assert written_before is not None and written_before.last_event == claimed.job.last_event == 1
    harness.redis.delete(keys.LOG + claimed.job.id)
    assert harness.failure(claimed)[0] == "log_lost"


def test_a_prompt_that_the_runner_refuses_fails_the_job(harness: Harness) -> None:
    runner = StubRunner(error=PromptRefused("template_error", "no"))
    assert harness.failure(harness.claimed(plain("word"), tokens=(1,)), runner) == ("template_error", "no")


def test_a_request_that_the_model_cannot_honour_fails(harness: Harness) -> None:
    claimed = harness.claimed(replace(plain("word"), thinking_budget=5), tokens=(1,))
    code, message = harness.failure(claimed, StubRunner(card=ModelCard("m", "text", 100, reasoning=False)))
    assert code == "template_error" and "thinking_budget" in message


@pytest.mark.parametrize("error", [RedisConnectionError("away"), TokenizerBusy("busy")])
def test_a_temporary_error_releases_the_job(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    with pytest.raises(TryLater):
        harness.preparer.prepare(harness.claimed(plain("word"), tokens=(1,)), StubRunner(error=error))


@pytest.mark.parametrize("error", [RuntimeError("broken"), ResponseError("WRONGTYPE")])
def test_other_errors_are_raised(harness: Harness, error: Exception) -> None:
    with pytest.raises(type(error)):
        harness.preparer.prepare(harness.claimed(plain("word"), tokens=(1,)), StubRunner(error=error))


def test_a_constraint_that_cannot_be_honoured_fails_its_job(harness: Harness) -> None:
    """Also if the prompt was tokenised by the API, which may have been too busy to check the constraint."""
    request = replace(plain("word"), constraint=Constraint("regex", "(?=a)b"))
    code, message = harness.failure(harness.claimed(request, tokens=(1,)))
    assert code == "constraint_error" and message.startswith("response_format.regex cannot be honoured")


def embedder(context: int = 100) -> StubRunner:
    return StubRunner(card=ModelCard("m", EMBED, context, vocabulary=50))


def inputs(*texts: str) -> Request:
    return Request("m", 0, Sampling(0.0), kind=EMBED, inputs=texts)


def test_inputs_are_tokenised_if_the_api_could_not(harness: Harness) -> None:
    prepared = harness.preparer.prepare(harness.claimed(inputs("word", "word word")), embedder())
    work = prepared.prompt.inputs
    assert work is not None
    assert (len(work.inputs), work.pending) == (2, {0, 1})
    assert prepared.prompt.tokens == work.inputs[1].tokens, "the longest input decides about memory"
    assert prepared.prompt.length == sum(len(each.tokens) for each in work.inputs)
    assert prepared.new_tokens == pack_inputs(work.inputs), "they are stored for later attempts"
    again = harness.preparer.prepare(harness.claimed(inputs("a", "b"), tokens=prepared.new_tokens), embedder())
    assert (again.prompt.inputs, again.new_tokens) == (work, None)


def test_inputs_that_the_model_cannot_read_fail_their_job(harness: Harness) -> None:
    code, message = harness.failure(harness.claimed(inputs("word", "word word word word")), embedder(context=3))
    assert code == "context_length_exceeded" and message.startswith("input[1] has ")
    stored = pack_inputs([Input((1, 60))])
    code, message = harness.failure(harness.claimed(inputs("word"), tokens=stored), embedder())
    assert code == "template_error" and "token id 60" in message


def test_a_job_for_a_model_of_another_kind_fails(harness: Harness) -> None:
    for claimed, runner in (
        (harness.claimed(inputs("word")), StubRunner()),
        (harness.claimed(plain("word")), embedder()),
    ):
        code, message = harness.failure(claimed, runner)
        assert code == "template_error" and message.startswith("m does not ")


@pytest.mark.parametrize(
    ("option", "reason"),
    [({"dimensions": 9}, "dimensions can be at most 8"), ({"prompt_name": "query"}, "m has no prompt 'query'")],
)
def test_options_of_inputs_that_the_model_lacks_are_refused(
    harness: Harness, option: dict[str, Any], reason: str
) -> None:
    runner = StubRunner(card=ModelCard("m", EMBED, 100, dimensions=8))
    code, message = harness.failure(harness.claimed(replace(inputs("word"), **option)), runner)
    assert code == "template_error" and reason in message
