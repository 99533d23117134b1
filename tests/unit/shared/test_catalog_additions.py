"""Models and aliases that are added to the catalog while the service runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from redis import ConnectionError as RedisUnreachable

from shared.models.additions import AddedModel, Additions, CatalogAdditions, CatalogUpdates
from shared.models.catalog import Catalog, load_catalog
from shared.redis import keys
from shared.redis.client import Redis
from shared.settings import Settings
from tests.support.small_models import make_folder


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    make_folder(tmp_path / "own")
    (tmp_path / "catalog.toml").write_text(f'[models.own]\npath = "{tmp_path}/own"\naliases = ["mine"]\n')
    return Settings(models_file=tmp_path / "catalog.toml", backend="fake")


@pytest.fixture
def updated(client: Redis, settings: Settings) -> Callable[[], Catalog]:
    """Returns the catalog after a refresh; always the same object."""
    catalog = load_catalog(settings)
    updates = CatalogUpdates(settings, catalog, CatalogAdditions(client))

    def refreshed() -> Catalog:
        updates.refresh()
        return catalog

    return refreshed


def test_added_models_and_aliases_appear_in_the_same_catalog(
    client: Redis, settings: Settings, updated: Callable[[], Catalog], tmp_path: Path
) -> None:
    catalog, additions = updated(), CatalogAdditions(client)
    assert set(catalog.models) == {"own"}
    make_folder(tmp_path / "new")
    additions.add(AddedModel("new", "org/new", "v2"))
    additions.set_aliases("new", ["fresh", "young"])
    additions.set_aliases("own", ["ours"])
    assert updated() is catalog
    assert (catalog.models["new"].path, catalog.models["new"].aliases) == (tmp_path / "new", ("fresh", "young"))
    assert {name: model.id for name in ("fresh", "ours", "mine") if (model := catalog.resolve(name))} == {
        "fresh": "new", "ours": "own", "mine": "own",
    }  # fmt: skip
    assert catalog.default == "own"
    additions.set_aliases("new", ["young"])
    assert updated().models["new"].aliases == ("young",)
    assert client.hgetall(keys.ALIASES) == {"young": "new", "ours": "own"}


def test_the_file_takes_precedence(client: Redis, updated: Callable[[], Catalog], tmp_path: Path) -> None:
    additions = CatalogAdditions(client)
    additions.add(AddedModel("own", "other/own"))
    additions.set_aliases("elsewhere", ["mine", "own"])
    catalog = updated()
    assert (catalog.models["own"].path, catalog.models["own"].aliases) == (tmp_path / "own", ("mine",))


def test_a_model_that_is_on_another_host_only_can_be_named(
    client: Redis, settings: Settings, updated: Callable[[], Catalog]
) -> None:
    CatalogAdditions(client).add(AddedModel("remote", "org/remote"))
    assert updated().models["remote"].declared_kind is None


def test_fields_of_newer_versions_are_skipped(client: Redis) -> None:
    client.hset(keys.ADDED_MODELS, "new", json.dumps({"id": "new", "hub": "org/new", "adapter": "x"}))
    assert CatalogAdditions(client).read() == Additions({"new": AddedModel("new", "org/new")}, {})


def test_the_catalog_stays_while_redis_is_unreachable(
    client: Redis, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog, additions = load_catalog(settings), CatalogAdditions(client)
    updates = CatalogUpdates(settings, catalog, additions)
    reads: list[None] = []

    def unreachable() -> Additions:
        reads.append(None)
        raise RedisUnreachable("away")

    monkeypatch.setattr(additions, "read", unreachable)
    updates.refresh_if_due()
    updates.refresh_if_due()
    assert (set(catalog.models), len(reads)) == ({"own"}, 1), "it is not asked again at once"
    with pytest.raises(RedisUnreachable):
        updates.refresh()
