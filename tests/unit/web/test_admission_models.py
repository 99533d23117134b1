"""Admission: aliases, defaults and images of models in the catalog."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from shared.jobs.request import Request
from shared.models.catalog import Catalog, CatalogModel
from shared.models.registry import HostInfo, Registry, WorkerInfo
from shared.models.sampling_defaults import SamplingDefaults
from shared.redis.client import Redis
from shared.settings import Settings
from tests.plugins.admission import CARD, FakeNotifier, job_request, make_admission, refusal
from web.admission.admit import Admission, RequestContext
from web.schemas.messages import Message, Part, StoredImage
from web.schemas.requests import JobRequest


@pytest.fixture
def catalog_admission(client: Redis, settings: Settings, notifier: FakeNotifier) -> Admission:
    """An admission whose catalog has `small`, with the alias `tiny`, which is warm, and `other`, which is cold."""
    Registry(client).announce_model(CARD)
    defaults = SamplingDefaults(max_tokens=9, temperature=0.25, top_p=0.5, repetition_penalty=1.5)
    models = {
        "small": CatalogModel("small", Path("small"), "text", aliases=("tiny",), sampling=defaults),
        "other": CatalogModel("other", Path("other"), "text", context=32, sampling=SamplingDefaults(max_tokens=1000)),
    }
    return make_admission(client, settings, notifier, Catalog(models, "small"))


def generation(admission: Admission, **fields: object) -> Request:
    request = JobRequest.model_validate({"prompt": "hi", **fields})
    return admission.submission(request, RequestContext("me")).request


@pytest.mark.parametrize("name", [{}, {"model": None}, {"model": "small"}, {"model": "tiny"}])
def test_an_alias_is_resolved_to_the_id_of_the_model(catalog_admission: Admission, name: dict[str, object]) -> None:
    assert generation(catalog_admission, **name).model == "small"


def test_the_defaults_of_a_model_fill_omitted_fields(catalog_admission: Admission, settings: Settings) -> None:
    omitted = generation(catalog_admission)
    assert (omitted.max_tokens, omitted.sampling.temperature, omitted.sampling.top_p) == (9, 0.25, 0.5)
    assert (omitted.sampling.repetition_penalty, omitted.sampling.top_k, omitted.sampling.min_p) == (1.5, 0, 0)
    explicit = generation(catalog_admission, max_tokens=3, temperature=1, top_p=1.0, repetition_penalty=1)
    assert (explicit.max_tokens, explicit.sampling.temperature, explicit.sampling.top_p) == (3, 1, 1)
    assert explicit.sampling.repetition_penalty == 1
    null = generation(catalog_admission, max_tokens=None, temperature=None)
    assert (null.max_tokens, null.sampling.temperature) == (9, 0.25)
    assert generation(catalog_admission, model="other").sampling.temperature == settings.temperature


def test_a_cold_models_default_of_max_tokens_is_limited_to_its_context(catalog_admission: Admission) -> None:
    assert generation(catalog_admission, model="other").max_tokens == 32
    request = JobRequest.model_validate({"prompt": "hi", "model": "other", "max_tokens": 33})
    assert refusal(catalog_admission, request).field == "max_tokens"


@pytest.mark.parametrize(
    ("weights_bytes", "kind", "accepted"), [(8, "text", False), (8, "vision", True), (0, "text", True)]
)
def test_a_cold_text_model_refuses_images(
    catalog_admission: Admission, weights_bytes: int, kind: str, accepted: bool
) -> None:
    catalog_admission._catalog.models["other"] = CatalogModel("other", Path("other"), kind, weights_bytes=weights_bytes)
    content = [StoredImage(image="a" * 64, width=64, height=48), Part(type="text", text="What?")]
    message = Message.model_construct(role="user", content=content)
    request = job_request(model="other").model_copy(update={"prompt": None, "messages": [message]})
    if accepted:
        assert catalog_admission.submission(request, RequestContext("me")).request.image_parts
    else:
        error = refusal(catalog_admission, request)
        assert (error.status, error.code, error.field) == (422, "no_images", "model")


@pytest.mark.parametrize(
    ("text_only", "what"), [(True, "is served without its image encoder"), (False, "is a text model")]
)
def test_the_refusal_of_images_says_whether_the_folder_has_an_encoder(
    catalog_admission: Admission, text_only: bool, what: str
) -> None:
    model = CatalogModel("other", Path("other"), "text", weights_bytes=8, text_only=text_only)
    catalog_admission._catalog.models["other"] = model
    content = [StoredImage(image="a" * 64, width=64, height=48), Part(type="text", text="What?")]
    message = Message.model_construct(role="user", content=content)
    request = job_request(model="other").model_copy(update={"prompt": None, "messages": [message]})
    assert str(refusal(catalog_admission, request)).startswith(f"model: other {what} and does not accept images")


def test_a_model_that_was_just_loaded_is_accepted(
    catalog_admission: Admission, client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        catalog_admission, "_settings", catalog_admission._settings.model_copy(update={"load_on_demand": False})
    )
    error = refusal(catalog_admission, job_request(model="other"))
    assert (error.status, error.code, error.field) == (409, "model_not_loaded", "model")
    now = time.time()
    worker = WorkerInfo("w1", "w1@here", "here", 1, "other", "ready", 8, 0, now, now, {}, {})
    Registry(client).announce_worker(worker, 60.0)
    assert catalog_admission.submission(job_request(model="other"), RequestContext("me")).request.model == "other"


def test_jobs_for_the_default_model_are_accepted_cold_only_while_there_is_no_worker(
    catalog_admission: Admission, client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        catalog_admission, "_settings", catalog_admission._settings.model_copy(update={"load_on_demand": False})
    )
    assert catalog_admission.submission(job_request(), RequestContext("me")).request.model == "small"
    Registry(client).announce_host(HostInfo("w1@here", "here", 1, 0.0, time.time(), (), 100, 0), 60.0)
    error = refusal(catalog_admission, job_request())
    assert (error.status, error.code, error.field) == (409, "model_not_loaded", "model")
