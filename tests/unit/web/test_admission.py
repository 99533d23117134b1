"""Admission: defaults, models, limits, images and wake-ups."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError

from shared.errors import KeyReused, Unavailable
from shared.jobs.record import Parsing, Priority
from shared.jobs.request import Constraint, Request
from shared.jobs.store import Jobs
from shared.models.catalog import Catalog, CatalogModel
from shared.models.registry import Registry
from shared.models.sampling_defaults import SamplingDefaults
from shared.redis import keys
from shared.redis.client import Redis
from shared.settings import Settings
from tests.plugins.admission import CARD, FakeNotifier, job_request, make_admission, refusal
from web.admission.admit import Admission, RequestContext
from web.admission.generation import RESERVED_TOKENS
from web.schemas.requests import JobRequest


def test_a_job_is_recorded_before_its_workers_are_woken(
    admission: Admission, notifier: FakeNotifier, client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(notifier, "wake", lambda models: seen.extend([*models, *client.keys("mlxq:job:*")]))
    accepted = admission.admit(job_request(), RequestContext("me", request_id="r1"))
    assert accepted.new and seen == ["small", f"mlxq:job:{accepted.job.id}"]
    assert client.hget(f"mlxq:job:{accepted.job.id}", "owner") == "me"


def test_workers_are_woken_once_for_several_jobs(admission: Admission, notifier: FakeNotifier) -> None:
    assert [admission.admit(job_request(), RequestContext("me")).new for _ in range(5)] == [True] * 5
    assert notifier.woken == ["small"]


def test_a_redis_failure_after_the_job_was_stored_does_not_refuse_it(
    admission: Admission, notifier: FakeNotifier, client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unavailable(*_: object) -> None:
        raise RedisConnectionError

    monkeypatch.setattr(notifier, "wake", lambda _: monkeypatch.setattr(admission._cluster, "snapshot", unavailable))
    accepted = admission.admit(job_request(), RequestContext("me"))
    assert accepted.new and client.zrank(f"{keys.QUEUE}small", accepted.job.id) is not None


def test_a_repeated_request_wakes_no_worker(admission: Admission, notifier: FakeNotifier) -> None:
    origin = RequestContext("me", idempotency_key="k", fingerprint="f")
    first = admission.admit(job_request(), origin)
    notifier.woken.clear()
    again = admission.admit(job_request(), origin)
    assert (again.job.id, again.new, notifier.woken) == (first.job.id, False, [])


def test_the_service_has_defaults(admission: Admission, settings: Settings) -> None:
    request = admission.submission(JobRequest.model_validate({"prompt": "hi"}), RequestContext("me")).request
    assert request.model == settings.model_id
    assert request.sampling.temperature == settings.temperature


def test_without_max_tokens_the_answer_may_fill_the_context(
    admission: Admission, client: Redis, settings: Settings, notifier: FakeNotifier
) -> None:
    assert settings.max_tokens is None
    assert admission.submission(job_request(), RequestContext("me")).request.max_tokens == CARD.context
    limited = make_admission(client, settings.model_copy(update={"max_tokens": 7}), notifier)
    assert limited.submission(job_request(), RequestContext("me")).request.max_tokens == 7


def test_memory_is_reserved_for_an_answer_of_usual_length_unless_its_length_is_requested(
    admission: Admission, client: Redis
) -> None:
    Registry(client).announce_model(replace(CARD, context=100_000))

    def growth(**fields: object) -> int:
        accepted = admission.admit(job_request(**fields), RequestContext("me"))
        return int(client.hget(keys.JOB + accepted.job.id, "growth_bytes") or 0)

    assert growth() == growth(max_tokens=RESERVED_TOKENS) == growth(max_tokens=2 * RESERVED_TOKENS) // 2 + 1024
    assert growth(max_tokens=50) < growth()


def test_what_the_files_of_a_model_declare_applies_unless_the_catalog_or_the_request_says_otherwise(
    client: Redis, settings: Settings, notifier: FakeNotifier
) -> None:
    declared = SamplingDefaults(temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.1)
    model = CatalogModel(
        "small", Path("small"), "text", sampling=SamplingDefaults(top_p=0.9), declared_sampling=declared
    )
    admission = make_admission(client, settings, notifier, Catalog({"small": model}, "small"))

    def used(**fields: object) -> dict[str, Any]:
        sampling = admission.admit(job_request(**fields), RequestContext("me")).job.sampling
        assert sampling is not None
        return sampling

    for _ in range(2):
        sampling = used(top_k=5, seed=3, max_tokens=9)
        assert sampling == {
            "max_tokens": 9, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.0, "repetition_penalty": 1.1,
            "presence_penalty": 0.0, "frequency_penalty": 0.0, "seed": 3,
        }  # fmt: skip
        assert used(temperature=0, top_p=1.0)["temperature"] == 0 and used(top_p=1.0)["top_p"] == 1
        # The card of a worker counts more than this host's files, which may be others.
        Registry(client).announce_model(replace(CARD, sampling=declared.model_dump(exclude_none=True)))
        model = replace(model, declared_sampling=SamplingDefaults(temperature=0.1))
        admission = make_admission(client, settings, notifier, Catalog({"small": model}, "small"))


def test_options_for_templates_and_logits_reach_the_job(admission: Admission) -> None:
    tool = {"type": "function", "function": {"name": "add"}}
    choice = {"type": "function", "function": {"name": "add"}}
    fields = {
        "prompt": None,
        "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a"}],
        "continue_final_message": True,
        "tools": [tool],
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "chat_template_kwargs": {"x": [1]},
        "enable_thinking": False,
        "reasoning_effort": "low",
        "thinking_budget": 7,
        "response_format": {"type": "regex", "regex": "a+"},
        "logit_bias": {"9": 1, "7": -1.5},
    }
    request = admission.submission(job_request(**fields), RequestContext("me")).request
    assert request == replace(
        request,
        continue_final=True,
        tools=(tool,),
        tool_choice="function:add",
        parallel_tool_calls=False,
        template_variables={"x": [1], "enable_thinking": False, "reasoning_effort": "low"},
        thinking_budget=7,
        constraint=Constraint("regex", "a+"),
        logit_bias=((7, -1.5), (9, 1.0)),
    )


def test_token_ids_are_checked_and_stored(admission: Admission, client: Redis) -> None:
    Registry(client).announce_model(replace(CARD, vocabulary=10))
    submission = admission.submission(job_request(prompt=None, prompt_tokens=[9, 3]), RequestContext("me"))
    assert (submission.tokens, submission.request.prompt, submission.request.messages) == ((9, 3), None, None)
    for fields, field in (
        ({"prompt": None, "prompt_tokens": [3, 10]}, "prompt_tokens[1]"),
        ({"logit_bias": {"9": 1, "10": 1}}, "logit_bias.10"),
    ):
        error = refusal(admission, job_request(**fields))
        assert (error.status, error.field) == (422, field) and "the model has no token 10" in error.detail
    error = refusal(admission, job_request(prompt=None, prompt_tokens=[1] * CARD.context))
    assert (error.code, error.field) == ("context_length_exceeded", "prompt_tokens")


@pytest.mark.parametrize("prompt", [{"raw": True}, {"prompt": None, "prompt_tokens": [1]}])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "add"}}]),
        ("chat_template_kwargs", {"x": 1}),
        ("enable_thinking", False),
        ("reasoning_effort", "none"),
    ],
)
def test_options_of_the_template_need_a_prompt_that_goes_through_it(
    admission: Admission, prompt: dict[str, object], field: str, value: object
) -> None:
    error = refusal(admission, job_request(**prompt, **{field: value}))
    assert (error.status, error.field) == (422, field) and "skip the chat template" in error.detail


def test_the_catalog_has_defaults_for_template_variables(
    client: Redis, settings: Settings, notifier: FakeNotifier
) -> None:
    defaults = {"enable_thinking": False, "x": 1}
    model = CatalogModel("small", Path("small"), "text", chat_template_kwargs=defaults)
    admission = make_admission(client, settings, notifier, Catalog({"small": model}, "small"))
    for fields, variables in (
        ({}, defaults),
        ({"enable_thinking": True}, {**defaults, "enable_thinking": True}),
        ({"chat_template_kwargs": {"x": 2}}, {**defaults, "x": 2}),
    ):
        assert admission.submission(job_request(**fields), RequestContext("me")).request.template_variables == variables
    raw = admission.submission(job_request(raw=True), RequestContext("me")).request
    assert raw.template_variables == {}, "a raw prompt skips the template"


def test_a_seed_is_random_unless_requested(admission: Admission) -> None:
    seeds = {admission.submission(job_request(), RequestContext("me")).request.sampling.seed for _ in range(20)}
    assert len(seeds) == 20
    assert admission.submission(job_request(seed=0), RequestContext("me")).request.sampling.seed == 0


def test_the_fields_of_a_request_reach_the_job(admission: Admission) -> None:
    request = job_request(
        priority="batch", deadline_s=5, start_within_s=3, metadata={"a": "b"}, stop="x", temperature=0
    )
    submission = admission.submission(request, RequestContext("me"))
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
def test_an_invalid_request_is_refused_and_not_enqueued(
    admission: Admission, client: Redis, more: dict[str, object], code: str, field: str
) -> None:
    error = refusal(admission, job_request(**more))
    assert (error.status, error.code, error.field) == (404 if code == "model_not_found" else 422, code, field)
    assert client.keys("mlxq:job:*") == [] and client.keys("mlxq:queue:*") == []


def test_time_limits_may_exceed_the_default_but_not_the_maximum(
    client: Redis, settings: Settings, notifier: FakeNotifier
) -> None:
    limits = {"start_within_s": 10, "max_start_within_s": 20, "deadline_s": 30, "max_deadline_s": 2592000}
    admission = make_admission(client, settings.model_copy(update=limits), notifier)

    def times(**more: object) -> tuple[float, float]:
        job = admission.admit(JobRequest.model_validate({"prompt": "hi", **more}), RequestContext("me")).job
        expires_at = client.zscore("mlxq:timers", job.id), float(client.hget("mlxq:job:" + job.id, "end_by"))
        return tuple(round(at - job.created_at, 3) for at in expires_at)  # type: ignore[return-value]

    assert times() == (10, 30)
    assert times(start_within_s=20, deadline_s=2592000) == (20, 2592000)
    assert times(deadline_s=5) == (5, 5)
    for field, maximum in (("start_within_s", "20"), ("deadline_s", "2592000")):
        error = refusal(admission, JobRequest.model_validate({"prompt": "hi", field: float(maximum) + 0.5}))
        assert (error.status, error.field, error.detail) == (422, field, f"{field} can be at most {maximum} seconds.")


def test_a_full_queue_refuses_jobs_with_a_retry_time(client: Redis, settings: Settings, notifier: FakeNotifier) -> None:
    admission = make_admission(client, settings.model_copy(update={"max_queue": 1, "max_queue_per_key": 2}), notifier)
    request = JobRequest.model_validate({"prompt": "hi"})
    admission.admit(request, RequestContext("me"))
    error = refusal(admission, request)
    assert (error.status, error.code) == (503, "queue_full") and error.retry_after


def no_memory(args: object) -> None:
    raise OutOfMemoryError


def test_images_of_refused_and_repeated_requests_are_deleted(
    admission: Admission, client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"a" * 64: b"picture"}
    origin = RequestContext("me", idempotency_key="k", fingerprint="f")
    job = admission.admit(job_request(), origin, files).job
    assert client.hgetall(keys.IMAGES + job.id)
    again = admission.admit(job_request(), origin, files)
    assert (again.job.id, again.new) == (job.id, False)
    with pytest.raises(KeyReused):
        admission.admit(job_request(), RequestContext("me", idempotency_key="k", fingerprint="other"), files)
    monkeypatch.setattr(admission._jobs, "_enqueue", no_memory)
    with pytest.raises(OutOfMemoryError):
        admission.admit(job_request(), origin, files)
    assert [*client.scan_iter(f"{keys.IMAGES}*")] == [keys.IMAGES + job.id]


def test_a_request_with_skipped_images_creates_no_job(admission: Admission, client: Redis) -> None:
    origin, files = RequestContext("me", idempotency_key="k", fingerprint="f"), {"a" * 64: b"picture"}
    job = admission.admit(job_request(), origin, {**files, "b" * 64: b"other"}).job
    again = admission.admit(job_request(), origin, files, skipped_images=1)
    assert (again.job, again.new) == (job, False)
    client.delete(keys.JOB + job.id)  # its retention is over
    with pytest.raises(Unavailable):
        admission.admit(job_request(), origin, files, skipped_images=1)
    assert not client.keys(f"{keys.JOB}*")


def test_the_job_keeps_what_coordinates_refer_to_if_the_request_says_it(admission: Admission) -> None:
    def parse(coordinates: str) -> JobRequest:
        return job_request(parse={"format": "grounding", "coordinates": coordinates})

    assert admission.admit(parse("pixels"), RequestContext("me")).job.parsing == Parsing("grounding", None, "pixels")
    assert refusal(admission, parse("resized")).field == "parse.coordinates"


@pytest.mark.parametrize("logprobs", [None, 0, 20])
def test_logprobs_are_stored_in_the_request_and_flagged_in_the_record(
    admission: Admission, client: Redis, logprobs: int | None
) -> None:
    job = admission.admit(job_request(logprobs=logprobs), RequestContext("me")).job
    assert job.logprobs is (logprobs is not None)
    stored = Request.from_json(client.hget(keys.REQUEST + job.id, "request"))
    assert stored.logprobs == logprobs


@pytest.mark.parametrize(
    ("setting", "status", "code"),
    [("queue_bytes_per_key", 429, "key_queue_full"), ("queue_bytes", 503, "queue_memory_full")],
)
def test_a_queue_without_free_bytes_refuses_jobs_with_a_retry_time(
    client: Redis, settings: Settings, notifier: FakeNotifier, setting: str, status: int, code: str
) -> None:
    tight = settings.model_copy(update={"queue_bytes": 2**30, "queue_bytes_per_key": 2**29} | {setting: 2**20})
    admission = make_admission(client, tight, notifier)
    request = JobRequest.model_validate({"prompt": "x" * 400_000, "max_tokens": 1})
    accepted = [admission.admit(request, RequestContext("me")).job for _ in range(2)]
    error = refusal(admission, request)
    assert (error.status, error.code) == (status, code) and error.retry_after
    if status == 429:
        assert admission.admit(request, RequestContext("another")).new
    Jobs(client, tight).stop(accepted[0].id, "me")
    assert admission.admit(request, RequestContext("me")).new, "a job that has ended frees its bytes"


@pytest.mark.parametrize("log_prompts", [False, True])
def test_prompts_are_logged_only_if_a_setting_says_so(
    client: Redis, settings: Settings, notifier: FakeNotifier, caplog: pytest.LogCaptureFixture, log_prompts: bool
) -> None:
    caplog.set_level("INFO")
    Registry(client).announce_model(CARD)
    admission = make_admission(client, settings.model_copy(update={"log_prompts": log_prompts}), notifier)
    job = admission.admit(job_request(prompt="shown in the log"), RequestContext("me")).job
    lines = [vars(record) for record in caplog.records if "shown in the log" in str(vars(record))]
    assert [(line["message"], line["job_id"]) for line in lines] == [("prompt", job.id)] * log_prompts
