"""An admission without workers, whose wake-ups are recorded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest

from shared.errors import MlxqError
from shared.jobs.images import ImageStore
from shared.jobs.store import Jobs
from shared.models.catalog import Catalog, load_catalog
from shared.models.registry import ModelCard, Registry
from shared.redis.client import Redis
from shared.settings import Settings
from shared.tokenizing.client import Tokenizing
from shared.tokenizing.files import TokenizerFiles
from web.admission.admit import Admission, RequestContext
from web.admission.prompt_tokenizer import PromptTokenizer
from web.cluster.snapshot import Cluster
from web.schemas.requests import JobRequest

CARD = ModelCard("small", "text", context=64)


class FakeNotifier:
    """Records wake-ups."""

    def __init__(self) -> None:
        self.woken: list[str] = []

    def wake(self, models: Iterable[str]) -> None:
        self.woken += models


_opened: list[Tokenizing] = []


@pytest.fixture
def notifier() -> Iterator[FakeNotifier]:
    """Records wake-ups; afterwards, the helper processes of all admissions are closed."""
    yield FakeNotifier()
    while _opened:
        _opened.pop().close()


def make_admission(
    client: Redis, settings: Settings, notifier: FakeNotifier, catalog: Catalog | None = None
) -> Admission:
    """An admission without tokenizers. It starts a helper process only to check a constraint."""
    tokenizing = Tokenizing(20.0)
    _opened.append(tokenizing)
    return Admission(
        settings,
        catalog or load_catalog(settings),
        Jobs(client, settings),
        ImageStore(client),
        Cluster(Registry(client)),
        PromptTokenizer(tokenizing, TokenizerFiles(settings.tokenizers_dir)),
        notifier,  # type: ignore[arg-type]
    )


@pytest.fixture
def admission(client: Redis, settings: Settings, notifier: FakeNotifier) -> Admission:
    Registry(client).announce_model(CARD)
    return make_admission(client, settings, notifier)


def job_request(**more: object) -> JobRequest:
    return JobRequest.model_validate({"prompt": "hi", "model": "small", **more})


def refusal(admission: Admission, request: JobRequest) -> MlxqError:
    with pytest.raises(MlxqError) as caught:
        admission.admit(request, RequestContext("me"))
    return caught.value
