"""What is added to the catalog while the service runs: downloaded models, and aliases. It is stored in Redis.

`models/catalog.toml` belongs to the operator and is never written. Its entries take precedence.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Final, Self

from redis import RedisError

from shared.models.catalog import Catalog, CatalogModel, load_catalog, with_declared
from shared.models.folder import model_kind
from shared.redis import keys
from shared.redis.client import Redis
from shared.settings import Settings
from shared.wire import known_fields

log = logging.getLogger(__name__)

MAX_AGE_S: Final = 1.0
"""How old the additions that a process knows may be."""


@dataclass(frozen=True, slots=True)
class AddedModel:
    """A model that was downloaded.

    Attributes:
        id: its id, and the name of its folder next to the catalog.
        hub: id of its repository on the hub.
        revision: the requested branch, tag or commit; empty for the default branch.
    """

    id: str
    hub: str
    revision: str = ""

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Parse the value of a field, also one of another version."""
        return cls(**known_fields(cls, json.loads(text)))


@dataclass(frozen=True, slots=True)
class Additions:
    """The additions at one moment. `aliases` maps each alias to a model's id."""

    models: Mapping[str, AddedModel] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)

    def aliases_of(self, model: str) -> list[str]:
        """Return the added aliases of a model."""
        return sorted(alias for alias, owner in self.aliases.items() if owner == model)


class CatalogAdditions:
    """The additions in Redis. Methods raise `redis.RedisError` if Redis is unreachable."""

    def __init__(self, client: Redis) -> None:
        self._client = client

    def read(self) -> Additions:
        """Return all additions."""
        with self._client.pipeline(transaction=False) as pipe:
            pipe.hgetall(keys.ADDED_MODELS)
            pipe.hgetall(keys.ALIASES)
            models, aliases = pipe.execute()
        return Additions({name: AddedModel.from_json(text) for name, text in models.items()}, aliases)

    def add(self, model: AddedModel) -> None:
        """Add a model, or replace the one with its id."""
        self._client.hset(keys.ADDED_MODELS, model.id, json.dumps(asdict(model)))

    def remove(self, model: str) -> None:
        """Remove a model and its aliases."""
        self.set_aliases(model, ())
        self._client.hdel(keys.ADDED_MODELS, model)

    def set_aliases(self, model: str, aliases: Iterable[str]) -> None:
        """Replace the added aliases of a model."""
        old = self.read().aliases_of(model)
        with self._client.pipeline(transaction=True) as pipe:
            if old:
                pipe.hdel(keys.ALIASES, *old)
            for alias in aliases:
                pipe.hset(keys.ALIASES, alias, model)
            pipe.execute()


class CatalogUpdates:
    """Keeps the catalog of a process up to date with the additions. Any thread may call its methods.

    Args:
        catalog: the catalog, whose content is replaced when the additions change.
    """

    def __init__(self, settings: Settings, catalog: Catalog, additions: CatalogAdditions) -> None:
        self._settings = settings
        self._catalog = catalog
        self._additions = additions
        self._known = Additions()
        self._read_at = float("-inf")

    @property
    def known(self) -> Additions:
        """The additions that the catalog contains."""
        return self._known

    def refresh_if_due(self) -> None:
        """Read the additions if they were read too long ago. While Redis is unreachable, the catalog stays as it is."""
        if time.monotonic() - self._read_at < MAX_AGE_S:
            return
        try:
            self.refresh()
        except RedisError as error:
            log.debug("catalog_not_refreshed", extra={"reason": str(error)})

    def refresh(self) -> None:
        """Read the additions. If they have changed, also read the file again.

        Raises:
            redis.RedisError: Redis is unreachable.
        """
        self._read_at = time.monotonic()
        additions = self._additions.read()
        if additions != self._known:
            catalog = load_catalog(self._settings)
            self._catalog.replace_with(with_additions(catalog, additions, self._settings.models_dir))
            self._known = additions


def with_additions(catalog: Catalog, additions: Additions, models_dir: Path) -> Catalog:
    """Return a catalog with additions, except those that contradict the file.

    Args:
        models_dir: the folder that contains the folders of the added models.
    """
    models = dict(catalog.models)
    folders = {model.path.resolve() for model in models.values()}
    for added in additions.models.values():
        path = models_dir / added.id
        if added.id not in models and path.resolve() not in folders:
            models[added.id] = with_declared(CatalogModel(added.id, path, model_kind(path)))
    taken = {*models, *(alias for model in models.values() for alias in model.aliases)}
    for name, model in models.items():
        aliases = [alias for alias in additions.aliases_of(name) if alias not in taken]
        models[name] = replace(model, aliases=(*model.aliases, *aliases))
    return replace(catalog, models=models)
