"""A request names a model and one of its adapters in `model`, or the adapter in `adapter`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from shared.errors import MlxqError
from shared.jobs.request import Request, Sampling
from shared.models.catalog import Catalog, CatalogModel
from shared.models.registry import ModelCard, WorkerInfo
from web.admission.model_choice import choose_model
from web.admission.prefix_hashes import adapter_hash, prefix_hashes
from web.cluster.snapshot import ClusterSnapshot

BASE = "the model was trained for another base model"
ENTRY = CatalogModel("chat", Path("chat"), "text", aliases=("small",), adapters={"sql": Path("a"), "new": Path("b")})
CATALOG = Catalog({"chat": ENTRY, "plain": CatalogModel("plain", Path("plain"), "text")}, "chat")
CARD = ModelCard("chat", "text", 64, adapters={"sql": "", "odd": BASE})
REMOTE = ModelCard("remote", "text", 64, adapters={"far": ""})
WORKER = WorkerInfo("w", "w@h", "h", 1, "chat", "ready", 8, 0, 0.0, 0.0, {}, {}, protocol=2)
CLUSTER = ClusterSnapshot({"chat": CARD, "remote": REMOTE}, (WORKER, replace(WORKER, model="remote")), {}, 0.0)
COLD = ClusterSnapshot({"chat": CARD}, (), {}, 0.0)


@pytest.mark.parametrize(
    ("model", "adapter", "chosen"),
    [
        (None, None, ("chat", None)),
        (None, "sql", ("chat", "sql")),
        ("small", "sql", ("chat", "sql")),
        ("chat:sql", None, ("chat", "sql")),
        ("small:sql", "sql", ("chat", "sql")),
        ("remote", None, ("remote", None)),
        ("remote:far", None, ("remote", "far")),
    ],
)
def test_both_fields_name_an_adapter(model: str | None, adapter: str | None, chosen: tuple[str, str | None]) -> None:
    choice = choose_model(CATALOG, CLUSTER, model, adapter)
    assert (choice.model, choice.adapter) == chosen
    assert choice.card == CLUSTER.models.get(choice.model)


@pytest.mark.parametrize(
    ("model", "adapter", "code", "field", "detail"),
    [
        ("chat", "nobody", "adapter_not_found", "adapter", "chat has no adapter 'nobody'. Its adapters are sql."),
        ("chat:new", None, "adapter_not_found", "model", "chat has no adapter 'new'"),
        ("plain", "sql", "adapter_not_found", "adapter", "plain has no adapter 'sql'. It has none."),
        ("chat", "odd", "adapter_error", "adapter", f"odd cannot be used with chat: {BASE}."),
        ("chat:odd", None, "adapter_error", "model", BASE),
        ("chat:sql", "odd", "invalid_request", "adapter", "model already names the adapter 'sql'"),
        ("nobody:sql", None, "model_not_found", "model", "nobody:sql"),
        ("nobody", "sql", "model_not_found", "model", "nobody"),
    ],
)
def test_an_adapter_that_cannot_be_used_is_refused(
    model: str, adapter: str | None, code: str, field: str, detail: str
) -> None:
    with pytest.raises(MlxqError) as caught:
        choose_model(CATALOG, CLUSTER, model, adapter)
    error = caught.value
    assert (error.code, error.field) == (code, field)
    assert detail in error.detail


def test_a_model_that_no_worker_has_gets_the_adapters_of_the_catalog() -> None:
    assert choose_model(CATALOG, COLD, "chat", "new").adapter == "new"
    with pytest.raises(MlxqError, match="Its adapters are new, sql"):
        choose_model(CATALOG, COLD, "chat", "odd")


def test_workers_of_earlier_versions_announce_no_adapters() -> None:
    old = ClusterSnapshot({"chat": replace(CARD, adapters=None)}, (replace(WORKER, protocol=1),), {}, 0.0)
    assert choose_model(CATALOG, old, "chat", "sql").adapter == "sql"


def test_jobs_with_other_adapters_have_other_routing_keys() -> None:
    def keys(adapter: str | None) -> set[str]:
        request = Request("chat", 8, Sampling(0.0), prompt="text " * 300, raw=True, adapter=adapter)
        return {*prefix_hashes(request, "me"), *adapter_hash(request)}

    plain, sql, odd = keys(None), keys("sql"), keys("odd")
    assert len(sql) == len(plain) + 1, "one for the adapter itself"
    assert not plain & sql and not sql & odd
    assert keys("sql") == sql
