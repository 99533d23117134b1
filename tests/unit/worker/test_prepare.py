"""From a claimed job to its prompt, and every way in which that fails."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from shared.errors import PromptRefused
from shared.jobs.log import JobLog
from shared.jobs.request import Request
from shared.jobs.store import Jobs, Submission
from shared.models.registry import ModelCard
from shared.queue import keys
from shared.queue.claims import ClaimedJob
from shared.queue.redis import Redis
from shared.settings import Settings
from shared.tokenizing.client import TokenizerBusy, TokenizerError, Tokenizing
from shared.tokenizing.messages import TokenizerSource
from tests.support.fake_redis import FakeRedis
from tests.support.tokenizers import CHATML, HARM, chat, plain, written
from worker.queue.prepare import Preparer, TryLater
from worker.runner.base import Prompt


@dataclass
class StubRunner:
    """Takes what it is given; it may know tokens of its own."""

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


class Worker:
    """A preparer, and what it stands on."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.redis: Redis = FakeRedis()
        self.jobs = Jobs(self.redis, settings)
        self.tokenizing = Tokenizing(2.0)
        self.path = str(written(folder))
        self.sources = [TokenizerSource(self.path, chat_template=CHATML)]
        self.images: dict[str, bytes] = {}
        self.preparer = Preparer(self.tokenizing, lambda: self.sources, self.files, JobLog(self.redis))

    def files(self, job_id: str, digests: Any) -> Mapping[str, bytes]:
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
def worker(settings: Settings, tmp_path: Path) -> Iterator[Worker]:
    made = Worker(settings, tmp_path)
    with made.tokenizing:
        yield made


def test_stored_tokens_are_used_as_they_are(worker: Worker) -> None:
    prepared = worker.preparer.prepare(worker.claimed(plain("word"), tokens=(7, 8), shared=1), StubRunner(own=[9]))
    assert (prepared.prompt, prepared.written) == (Prompt((7, 8), 1), None)
    assert worker.tokenizing._short._helper is None


def test_a_runner_may_know_its_tokens(worker: Worker) -> None:
    assert worker.preparer.prepare(worker.claimed(plain("word")), StubRunner(own=[9])).prompt == Prompt((9,))
    assert worker.tokenizing._short._helper is None


def test_else_a_helper_tokenises(worker: Worker) -> None:
    system = {"role": "system", "content": "word"}
    claimed = worker.claimed(chat(system, "word", share=True))
    assert worker.preparer.prepare(claimed, StubRunner()).prompt == Prompt((4, 0, 3, 0, 5), 2)


@pytest.mark.parametrize("broken", ["gone.json", "broken.json"])
def test_where_one_source_does_not_work_the_next_does(worker: Worker, tmp_path: Path, broken: str) -> None:
    (tmp_path / "broken.json").write_text("{}")
    worker.sources.insert(0, TokenizerSource(str(tmp_path / broken)))
    assert worker.preparer.prepare(worker.claimed(plain("word")), StubRunner()).prompt == Prompt((2, 0))
    del worker.sources[1]
    with pytest.raises(TokenizerError):
        worker.preparer.prepare(worker.claimed(plain("word")), StubRunner())


@pytest.mark.parametrize("harm", ["endless", "huge", "talkative"])
def test_a_harmful_template_fails_its_job(worker: Worker, harm: str) -> None:
    worker.sources = [TokenizerSource(worker.path, chat_template=HARM[harm])]
    assert worker.failure(worker.claimed(chat("word")))[0] == "template_error"


def test_a_prompt_longer_than_the_context_fails_its_job(worker: Worker) -> None:
    code, said = worker.failure(worker.claimed(plain("word " * 99)))
    assert code == "context_length_exceeded" and "100 tokens" in said


def test_images_reach_the_runner(worker: Worker) -> None:
    worker.images["a"] = b"png"
    image = {"type": "image", "image": "a", "width": 8, "height": 8}
    claimed = worker.claimed(chat({"role": "user", "content": [image, image]}), tokens=(1,))
    runner = StubRunner()
    worker.preparer.prepare(claimed, runner)
    assert runner.images == {"a": b"png"}
    worker.images.clear()
    assert worker.failure(claimed)[0] == "image_lost"


def test_what_earlier_attempts_wrote_comes_with_the_prompt(worker: Worker) -> None:
    claimed = worker.claimed(plain("word"), attempt=2, tokens=(1,))
    written_before = worker.preparer.prepare(claimed, StubRunner()).written
    assert written_before is not None and written_before.last_event == claimed.job.last_event == 1
    worker.redis.delete(keys.LOG + claimed.job.id)
    assert worker.failure(claimed)[0] == "log_lost"


def test_what_the_runner_refuses_fails_the_job(worker: Worker) -> None:
    runner = StubRunner(error=PromptRefused("template_error", "no"))
    assert worker.failure(worker.claimed(plain("word"), tokens=(1,)), runner) == ("template_error", "no")


@pytest.mark.parametrize("error", [RedisConnectionError("away"), TokenizerBusy("busy")])
def test_what_passes_hands_the_job_back(worker: Worker, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    with pytest.raises(TryLater):
        worker.preparer.prepare(worker.claimed(plain("word"), tokens=(1,)), StubRunner(error=error))


@pytest.mark.parametrize("error", [RuntimeError("broken"), ResponseError("WRONGTYPE")])
def test_faults_that_stay_reach_the_claimer(worker: Worker, error: Exception) -> None:
    with pytest.raises(type(error)):
        worker.preparer.prepare(worker.claimed(plain("word"), tokens=(1,)), StubRunner(error=error))
