"""From requests to jobs: defaults, models, limits, wake-ups."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError

from shared.errors import Invalid, KeyReused, MlxqError, Unavailable
from shared.jobs.images import ImageStore
from shared.jobs.record import Priority
from shared.jobs.request import Request
from shared.jobs.store import Jobs
from shared.models.catalog import Catalog, CatalogModel, SamplingDefaults, load_catalog
from shared.models.registry import HostInfo, ModelCard, Registry, WorkerInfo
from shared.queue import keys
from shared.queue.redis import Redis
from shared.settings import Settings
from shared.tokenizing.client import Tokenizing
from shared.tokenizing.files import TokenizerFiles
from web.admission.admit import Admission, Origin
from web.admission.prompt_tokenizer import PromptTokenizer
from web.cluster.snapshot import Cluster
from web.schemas.requests import JobRequest, Message, Part, StoredImage

CARD = ModelCard("small", "text", context=64)


def untokenized(settings: Settings) -> PromptTokenizer:
    """For models whose tokenizers are not known: it starts no helper."""
    return PromptTokenizer(Tokenizing(1.0), TokenizerFiles(settings.tokenizers_dir))


class Bell:
    """Takes wake-ups. The real one swallows that the broker is away (`shared.queue.wakeups.Notifier`)."""

    def __init__(self) -> None:
        self.woken: list[str] = []

    def wake(self, models: Iterable[str]) -> None:
        self.woken += models


@pytest.fixture
def bell() -> Bell:
    return Bell()


@pytest.fixture
def admission(client: Redis, settings: Settings, bell: Bell) -> Admission:
    registry = Registry(client)
    registry.announce_model(CARD)
    jobs, images = Jobs(client, settings), ImageStore(client)
    return Admission(settings, load_catalog(settings), jobs, images, Cluster(registry), untokenized(settings), bell)  # type: ignore[arg-type]


def wanted(**more: object) -> JobRequest:
    return JobRequest.model_validate({"prompt": "hi", "model": "small", **more})


def refusal(admission: Admission, request: JobRequest) -> MlxqError:
    with pytest.raises(MlxqError) as caught:
        admission.admit(request, Origin("me"))
    return caught.value


def test_a_job_is_recorded_before_its_workers_are_woken(
    admission: Admission, bell: Bell, client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(bell, "wake", lambda models: seen.extend([*models, *client.keys("mlxq:job:*")]))
    accepted = admission.admit(wanted(), Origin("me", request_id="r1"))
    assert accepted.new and seen == ["small", f"mlxq:job:{accepted.job.id}"]
    assert client.hget(f"mlxq:job:{accepted.job.id}", "owner") == "me"


def test_workers_are_woken_once_for_jobs_that_come_together(admission: Admission, bell: Bell) -> None:
    assert [admission.admit(wanted(), Origin("me")).new for _ in range(5)] == [True] * 5
    assert bell.woken == ["small"]


def test_redis_going_away_behind_the_acceptance_does_not_refuse_the_job(
    admission: Admission, bell: Bell, client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> None:
        raise RedisConnectionError

    monkeypatch.setattr(bell, "wake", lambda _: monkeypatch.setattr(admission._cluster, "now", away))
    accepted = admission.admit(wanted(), Origin("me"))
    assert accepted.new and client.zrank(f"{keys.QUEUE}small", accepted.job.id) is not None


def test_a_repeated_request_wakes_nobody(admission: Admission, bell: Bell) -> None:
    origin = Origin("me", idempotency_key="k", fingerprint="f")
    first = admission.admit(wanted(), origin)
    bell.woken.clear()
    again = admission.admit(wanted(), origin)
    assert (again.job.id, again.new, bell.woken) == (first.job.id, False, [])


def test_defaults_are_the_services(admission: Admission, settings: Settings) -> None:
    generation = admission.submission(JobRequest.model_validate({"prompt": "hi"}), Origin("me")).request
    assert generation.model == settings.model_id
    assert (generation.max_tokens, generation.sampling.temperature) == (settings.max_tokens, settings.temperature)


def test_the_default_length_is_held_within_the_context(admission: Admission) -> None:
    assert admission.submission(wanted(), Origin("me")).request.max_tokens == CARD.context


def test_a_seed_is_chosen_and_kept(admission: Admission) -> None:
    seeds = {admission.submission(wanted(), Origin("me")).request.sampling.seed for _ in range(20)}
    assert len(seeds) == 20
    assert admission.submission(wanted(seed=0), Origin("me")).request.sampling.seed == 0


def test_what_was_asked_reaches_the_job(admission: Admission) -> None:
    asked = wanted(priority="batch", deadline_s=5, start_within_s=3, metadata={"a": "b"}, stop="x", temperature=0)
    submission = admission.submission(asked, Origin("me"))
    assert (submission.priority, submission.deadline_s, submission.start_within_s) == (Priority.BATCH, 5, 3)
    assert (submission.metadata, submission.request.stop) == ({"a": "b"}, ("x",))
    assert submission.request.sampling.temperature == 0


@pytest.mark.parametrize(
    ("more", "code", "field"),
    [
        ({"model": "nobody"}, "model_not_found", "model"),
        ({"max_tokens": 65}, "invalid_request", "max_tokens"),
        ({"deadline_s": 1e6}, "invalid_request", "deadline_s"),
        ({"start_within_s": 1e6}, "invalid_request", "start_within_s"),
    ],
)
def test_what_cannot_be_run_is_refused_and_not_enqueued(
    admission: Admission, client: Redis, more: dict[str, object], code: str, field: str
) -> None:
    error = refusal(admission, wanted(**more))
    assert isinstance(error, Invalid) and (error.code, error.field) == (code, field)
    assert client.keys("mlxq:job:*") == [] and client.keys("mlxq:queue:*") == []


def test_a_request_may_ask_for_more_than_the_default_and_not_for_more_than_the_maximum(
    client: Redis, settings: Settings, bell: Bell
) -> None:
    registry = Registry(client)
    limits = {"start_within_s": 10, "max_start_within_s": 20, "deadline_s": 30, "max_deadline_s": 2592000}
    settings = settings.model_copy(update=limits)
    jobs = Jobs(client, settings)
    admission = Admission(
        settings, load_catalog(settings), jobs, ImageStore(client), Cluster(registry), untokenized(settings), bell
    )  # type: ignore[arg-type]

    def times(**more: object) -> tuple[float, float]:
        job = admission.admit(JobRequest.model_validate({"prompt": "hi", **more}), Origin("me")).job
        moments = client.zscore("mlxq:timers", job.id), float(client.hget("mlxq:job:" + job.id, "end_by"))
        return tuple(round(moment - job.created_at, 3) for moment in moments)  # type: ignore[return-value]

    assert times() == (10, 30)
    assert times(start_within_s=20, deadline_s=2592000) == (20, 2592000)
    assert times(deadline_s=5) == (5, 5)
    for field, most in (("start_within_s", "20"), ("deadline_s", "2592000")):
        error = refusal(admission, JobRequest.model_validate({"prompt": "hi", field: float(most) + 0.5}))
        assert (error.status, error.field, error.detail) == (422, field, f"{field} can be at most {most} seconds.")


def test_a_full_queue_is_told_with_a_time_to_come_back(client: Redis, settings: Settings, bell: Bell) -> None:
    registry = Registry(client)
    full = settings.model_copy(update={"max_queue": 1})
    admission = Admission(
        full,
        load_catalog(full),
        Jobs(client, full),
        ImageStore(client),
        Cluster(registry),
        untokenized(settings),
        bell,
    )  # type: ignore[arg-type]
    request = JobRequest.model_validate({"prompt": "hi"})
    admission.admit(request, Origin("me"))
    error = refusal(admission, request)
    assert (error.status, error.code) == (503, "queue_full") and error.retry_after


def no_memory(args: object) -> None:
    raise OutOfMemoryError


def test_images_of_what_is_not_accepted_are_dropped(
    admission: Admission, client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"a" * 64: b"picture"}
    origin = Origin("me", idempotency_key="k", fingerprint="f")
    job = admission.admit(wanted(), origin, files).job
    assert client.hgetall(keys.IMAGES + job.id)
    again = admission.admit(wanted(), origin, files)
    assert (again.job.id, again.new) == (job.id, False)
    with pytest.raises(KeyReused):
        admission.admit(wanted(), Origin("me", idempotency_key="k", fingerprint="other"), files)
    monkeypatch.setattr(admission._jobs, "_enqueue", no_memory)
    with pytest.raises(OutOfMemoryError):
        admission.admit(wanted(), origin, files)
    assert [*client.scan_iter(f"{keys.IMAGES}*")] == [keys.IMAGES + job.id]


def test_no_job_is_made_of_a_repeated_request_without_its_images(admission: Admission, client: Redis) -> None:
    origin, files = Origin("me", idempotency_key="k", fingerprint="f"), {"a" * 64: b"picture"}
    job = admission.admit(wanted(), origin, {**files, "b" * 64: b"other"}).job
    again = admission.admit(wanted(), origin, files, unread=1)
    assert (again.job, again.new) == (job, False)
    client.delete(keys.JOB + job.id)  # its retention is over
    with pytest.raises(Unavailable):
        admission.admit(wanted(), origin, files, unread=1)
    assert not client.keys(f"{keys.JOB}*")


# What the catalog says of a model


@pytest.fixture
def known(client: Redis, settings: Settings, bell: Bell) -> Admission:
    """With a catalog of `small`, also called `tiny`, which is warm, and `other`, which is not."""
    registry = Registry(client)
    registry.announce_model(CARD)
    usual = SamplingDefaults(max_tokens=9, temperature=0.25, top_p=0.5, repetition_penalty=1.5)
    models = {
        "small": CatalogModel("small", Path("small"), "text", aliases=("tiny",), sampling=usual),
        "other": CatalogModel("other", Path("other"), "text", context=32, sampling=SamplingDefaults(max_tokens=1000)),
    }
    catalog, jobs = Catalog(models, "small"), Jobs(client, settings)
    return Admission(
        settings,
        catalog,
        jobs,
        ImageStore(client),
        Cluster(registry),
        untokenized(settings),
        bell,  # type: ignore[arg-type]
    )


def asked(admission: Admission, **fields: object) -> Request:
    request = JobRequest.model_validate({"prompt": "hi", **fields})
    return admission.submission(request, Origin("me")).request


@pytest.mark.parametrize("name", [{}, {"model": None}, {"model": "small"}, {"model": "tiny"}])
def test_a_model_goes_by_its_id_whatever_it_was_called(known: Admission, name: dict[str, object]) -> None:
    assert asked(known, **name).model == "small"


def test_a_models_defaults_fill_what_a_request_leaves_out(known: Admission, settings: Settings) -> None:
    found = asked(known)
    assert (found.max_tokens, found.sampling.temperature, found.sampling.top_p) == (9, 0.25, 0.5)
    assert (found.sampling.repetition_penalty, found.sampling.top_k, found.sampling.min_p) == (1.5, 0, 0)
    said = asked(known, max_tokens=3, temperature=1, top_p=1.0, repetition_penalty=1)
    assert (said.max_tokens, said.sampling.temperature, said.sampling.top_p) == (3, 1, 1)
    assert said.sampling.repetition_penalty == 1
    null = asked(known, max_tokens=None, temperature=None)
    assert (null.max_tokens, null.sampling.temperature) == (9, 0.25)
    assert asked(known, model="other").sampling.temperature == settings.temperature


def test_a_models_default_length_is_held_within_its_context(known: Admission) -> None:
    assert asked(known, model="other").max_tokens == 32
    request = JobRequest.model_validate({"prompt": "hi", "model": "other", "max_tokens": 33})
    assert refusal(known, request).field == "max_tokens"


@pytest.mark.parametrize(
    ("weights_bytes", "kind", "taken"), [(8, "text", False), (8, "vision", True), (0, "text", True)]
)
def test_a_text_model_takes_no_images_before_it_is_loaded_either(
    known: Admission, weights_bytes: int, kind: str, taken: bool
) -> None:
    known._catalog.models["other"] = CatalogModel("other", Path("other"), kind, weights_bytes=weights_bytes)
    content = [StoredImage(image="a" * 64, width=64, height=48), Part(type="text", text="What?")]
    message = Message.model_construct(role="user", content=content)
    request = wanted(model="other").model_copy(update={"prompt": None, "messages": [message]})
    if taken:
        assert known.submission(request, Origin("me")).request.image_parts
    else:
        error = refusal(known, request)
        assert (error.status, error.code, error.field) == (422, "no_images", "model")


def test_a_model_that_has_just_been_loaded_is_not_refused(
    known: Admission, client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known, "_settings", known._settings.model_copy(update={"load_on_demand": False}))
    error = refusal(known, wanted(model="other"))
    assert (error.status, error.code, error.field) == (409, "model_not_loaded", "model")
    now = time.time()
    worker = WorkerInfo("w1", "w1@here", "here", 1, "other", "ready", 8, 0, now, now, {}, {})
    Registry(client).announce_worker(worker, 60.0)
    assert known.submission(wanted(model="other"), Origin("me")).request.model == "other"


def test_the_default_model_is_waited_for_only_until_some_worker_is_there(
    known: Admission, client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known, "_settings", known._settings.model_copy(update={"load_on_demand": False}))
    assert known.submission(wanted(), Origin("me")).request.model == "small"
    Registry(client).announce_host(HostInfo("w1@here", "here", 1, 0.0, time.time(), (), 100, 0), 60.0)
    error = refusal(known, wanted())
    assert (error.status, error.code, error.field) == (409, "model_not_loaded", "model")


@pytest.mark.parametrize("asked_for", [None, 0, 20])
def test_log_probabilities_are_asked_for_in_the_request_and_noted_in_the_record(
    admission: Admission, client: Redis, asked_for: int | None
) -> None:
    job = admission.admit(wanted(logprobs=asked_for), Origin("me")).job
    assert job.logprobs is (asked_for is not None)
    stored = Request.from_json(client.hget(keys.REQUEST + job.id, "request"))
    assert stored.logprobs == asked_for


@pytest.mark.parametrize(
    ("setting", "status", "code"),
    [("queue_bytes_per_key", 429, "key_queue_full"), ("queue_bytes", 503, "queue_memory_full")],
)
def test_a_queue_that_holds_its_bytes_is_told_with_a_time_to_come_back(
    client: Redis, settings: Settings, bell: Bell, setting: str, status: int, code: str
) -> None:
    tight = settings.model_copy(update={"queue_bytes": 2**30, "queue_bytes_per_key": 2**29} | {setting: 2**20})
    registry = Registry(client)
    catalog, jobs = load_catalog(tight), Jobs(client, tight)
    admission = Admission(
        tight, catalog, jobs, ImageStore(client), Cluster(registry), untokenized(tight), bell,  # type: ignore[arg-type]
    )  # fmt: skip
    request = JobRequest.model_validate({"prompt": "x" * 400_000, "max_tokens": 1})
    accepted = [admission.admit(request, Origin("me")).job for _ in range(2)]
    error = refusal(admission, request)
    assert (error.status, error.code) == (status, code) and error.retry_after
    if status == 429:
        assert admission.admit(request, Origin("somebody else")).new
    jobs.stop(accepted[0].id, "me")
    assert admission.admit(request, Origin("me")).new, "a job that has ended makes room"
