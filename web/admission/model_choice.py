"""Which model a request names, by its id or an alias, and which adapter: `model:adapter`, or the field `adapter`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from shared.errors import Invalid, JobFailure
from shared.models.capabilities import adapter_problem
from shared.models.catalog import Catalog, CatalogModel
from shared.models.registry import ModelCard
from web.cluster.model_availability import model_not_found
from web.cluster.snapshot import ClusterSnapshot


class ModelChoice(NamedTuple):
    """What a request generates with.

    Attributes:
        card: None until a worker has first announced the model.
        adapter: None for the model without an adapter.
    """

    model: str
    card: ModelCard | None
    adapter: str | None = None


def choose_model(catalog: Catalog, cluster: ClusterSnapshot, name: str | None, adapter: str | None) -> ModelChoice:
    """Return what a request names.

    Args:
        name: the field `model`; None for the default model.
        adapter: the field `adapter`.

    Raises:
        NotFound: there is no such model.
        Invalid: the model has no such adapter, or cannot use it.
    """
    entry, named = catalog.resolve_adapter(name)
    model = entry.id if entry else name or catalog.default
    card = cluster.models.get(model)
    if card is None and entry is None:
        base, _, named = model.rpartition(":")
        card = cluster.models.get(base)
        if card is None:
            raise model_not_found(model)
        model = base
    if named and adapter not in (None, named):
        raise Invalid(f"adapter: model already names the adapter {named!r}; send one of them.", field="adapter")
    chosen = adapter or named or None
    if chosen is not None:
        known = usable_adapters(entry, card, loaded=cluster.has(model))
        _check(model, chosen, known, "model" if adapter is None else "adapter")
    return ModelChoice(model, card, chosen)


def usable_adapters(entry: CatalogModel | None, card: ModelCard | None, *, loaded: bool) -> Mapping[str, str]:
    """Return the adapters of a model, each with why it cannot be used, or an empty text.

    The workers that have the model know that. If none has it, one will load it with the adapters of the catalog.
    """
    announced = card.adapters if card is not None else None
    if announced is not None and (loaded or entry is None):
        return announced
    return dict.fromkeys(entry.adapters if entry else (), "")


def _check(model: str, adapter: str, known: Mapping[str, str], field: str) -> None:
    if adapter not in known:
        names = ", ".join(name for name, problem in sorted(known.items()) if not problem)
        has = f"Its adapters are {names}." if names else "It has none."
        raise Invalid(f"{field}: {model} has no adapter {adapter!r}. {has}", code="adapter_not_found", field=field)
    if known[adapter]:
        raise Invalid(
            f"{field}: {adapter_problem(model, adapter, known[adapter])}", code=JobFailure.ADAPTER, field=field
        )
