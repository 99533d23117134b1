"""Admission of embedding and rerank requests that would take too much memory."""

from __future__ import annotations

import pytest

from shared.errors import Invalid
from shared.jobs.inputs import MAX_INPUTS
from shared.jobs.request import RERANK
from shared.models.registry import ModelCard, Registry
from shared.redis.client import Redis
from shared.settings import Settings
from tests.plugins.admission import FakeNotifier, make_admission
from web.admission.admit import RequestContext
from web.schemas.inputs import RerankRequest


@pytest.mark.parametrize("announced", [True, False])
def test_a_long_query_is_not_copied_for_thousands_of_documents(
    client: Redis, settings: Settings, notifier: FakeNotifier, *, announced: bool
) -> None:
    if announced:
        Registry(client).announce_model(ModelCard(settings.model_path.name, RERANK, 512))
    admission = make_admission(client, settings, notifier)
    body = {"model": settings.model_path.name, "query": "q" * 10_000, "documents": ["d"] * MAX_INPUTS}
    with pytest.raises(Invalid, match="Shorten them or send fewer documents") as caught:
        admission.submission(RerankRequest.model_validate(body), RequestContext("me"))
    assert caught.value.field == "query"
    body["documents"] = ["d"] * 100
    if announced:
        assert admission.submission(RerankRequest.model_validate(body), RequestContext("me")).request.kind == RERANK
