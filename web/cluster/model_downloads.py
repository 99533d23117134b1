"""Download models from the hub, and edit aliases: what changes the catalog while the service runs.

A worker downloads, because it has the folder of the models. It reports progress in an operation.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from shared.errors import Conflict, Invalid, NotFound
from shared.models.additions import CatalogAdditions, CatalogUpdates
from shared.models.catalog import MODEL_NAME, Catalog, CatalogModel
from shared.models.operations import Operation, Operations
from shared.queue.wakeups import CANCEL_DOWNLOAD, DOWNLOAD
from web.cluster.model_availability import model_not_found
from web.cluster.model_manager import ModelManager

KIND = "download"
_EXAMINED: Final = 1000
"""Operations among which downloads are found: models may be loaded and unloaded often while one lasts for hours."""


class ModelDownloads:
    """Starts and cancels downloads, and sets aliases."""

    def __init__(
        self,
        operations: Operations,
        additions: CatalogAdditions,
        catalog: Catalog,
        updates: CatalogUpdates,
        manager: ModelManager,
    ) -> None:
        self._operations = operations
        self._additions = additions
        self._catalog = catalog
        self._updates = updates
        self._manager = manager

    def start(self, hub: str, revision: str | None, name: str | None, worker: str | None) -> Operation:
        """Ask a worker to download a model; return the operation, also if the same download is already under way.

        Args:
            hub: id of the repository on the hub.
            name: id of the model, and name of its folder; by default the repository's name.

        Raises:
            Conflict: another model has this name, or is being downloaded under it.
            Invalid: there is no such worker, or no model can have this name.
            Unavailable: there is no worker at all, or the broker is unavailable.
        """
        model = name or hub.rpartition("/")[2]
        source = f"{hub}@{revision}" if revision else hub
        self._updates.refresh()
        self._check_name(model, hub)
        host = self._manager.hosts(worker)[0]
        for operation in self.recent():
            if operation.model == model and not operation.state.terminal:
                if operation.source == source:
                    return operation
                detail = f"{operation.source} is being downloaded under the name {model}. Set another name."
                raise Conflict(detail, code="name_taken", field="name")
        operation = self._operations.begin(KIND, model, host.node, source)
        arguments: dict[str, object] = {"operation": operation.id, "hub": hub, "model": model}
        self._manager.send(DOWNLOAD, host.node, arguments | ({"revision": revision} if revision else {}))
        return operation

    def cancel(self, operation_id: str) -> Operation:
        """Cancel a download, unless it has ended. What was received is kept for the next download of this model.

        Raises:
            NotFound: there is no such download.
            Unavailable: the broker is unavailable.
        """
        operation = self._manager.get(operation_id)
        if operation.kind != KIND:
            raise NotFound("There is no such download.", code="operation_not_found")
        if not operation.state.terminal:
            self._manager.send(CANCEL_DOWNLOAD, operation.node, {"operation": operation.id})
        return operation

    def recent(self) -> list[Operation]:
        """Return the downloads of the last 24 hours, newest first."""
        return [operation for operation in self._manager.recent(_EXAMINED) if operation.kind == KIND]

    def set_aliases(self, name: str, aliases: Sequence[str]) -> CatalogModel:
        """Replace the aliases of a model, except those of the catalog's file. Return the model.

        Raises:
            NotFound: the catalog has no such model.
            Conflict: an alias belongs to another model.
        """
        self._updates.refresh()
        model = self._catalog.models.get(name)
        if model is None:
            raise model_not_found(name)
        for alias in aliases:
            owner = self._catalog.resolve(alias)
            if owner is not None and (owner.id != name or alias == name):
                raise Conflict(f"{alias} already is a name of {owner.id}.", code="alias_taken", field="aliases")
        of_file = set(model.aliases) - set(self._updates.known.aliases_of(name))
        self._additions.set_aliases(name, [alias for alias in dict.fromkeys(aliases) if alias not in of_file])
        self._updates.refresh()
        return self._catalog.models.get(name, model)

    def remove(self, model: str) -> None:
        """Remove a downloaded model from the catalog. Its files stay.

        Raises:
            NotFound: no such model was downloaded.
            Conflict: a worker has the model.
        """
        self._updates.refresh()
        if model not in self._updates.known.models:
            detail = f"{model!r} is not a model that was downloaded. Others are removed from the catalog's file."
            raise NotFound(detail, code="model_not_found", field="model")
        if loaded := self._manager.workers_with(model):
            detail = f"{', '.join(loaded)} has the model. Unload it first."
            raise Conflict(detail, code="model_loaded", field="model")
        self._additions.remove(model)
        self._updates.refresh()

    def _check_name(self, model: str, hub: str) -> None:
        """Refuse a name that a folder and Redis keys must not have, and that of another model."""
        if re.fullmatch(MODEL_NAME, model) is None:
            detail = f"{hub} has a name that no model can have. Set another name: letters, digits and . _ -"
            raise Invalid(detail, field="name")
        owner, added = self._catalog.resolve(model), self._updates.known.models.get(model)
        if owner is None or (added is not None and added.hub == hub):
            return
        raise Conflict(f"{model} already is a name of {owner.id}. Set another name.", code="name_taken", field="name")
