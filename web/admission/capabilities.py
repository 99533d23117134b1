"""Refuses requests with fields that the model or one of its workers would ignore."""

from __future__ import annotations

from typing import Final

from shared.errors import Invalid, Unavailable
from shared.jobs.request import Request
from shared.models.capabilities import missing_capability, newer_fields
from shared.models.registry import ModelCard, WorkerProtocol
from web.cluster.snapshot import ClusterSnapshot

_UPGRADE_S: Final = 30
"""`retry_after` of requests that a worker of an earlier version would not understand, in seconds."""


def check_capabilities(request: Request, card: ModelCard | None, cluster: ClusterSnapshot) -> None:
    """Refuse a request that cannot be honoured as a whole.

    Args:
        card: None if no worker has announced the model yet. Then the worker that loads the model checks the request.

    Raises:
        Invalid: the model lacks a capability that a field needs.
        Unavailable: a worker of an earlier version has the model.
    """
    check_workers(request, cluster)
    if card is not None and (missing := missing_capability(request, card)):
        field, reason = missing
        raise Invalid(f"{request.model} does not support {field}: {reason}.", code="not_supported", field=field)


def check_workers(request: Request, cluster: ClusterSnapshot) -> None:
    """Refuse a request that a worker of an earlier version could get and would misunderstand.

    Raises:
        Unavailable: such a worker has the model.
    """
    protocols = [each.protocol for each in cluster.workers if each.model == request.model]
    oldest = min(protocols, default=max(WorkerProtocol))
    for field, protocol in newer_fields(request):
        if oldest < protocol:
            detail = f"{field}: a worker that has {request.model} is of an earlier version."
            raise Unavailable(f"{detail} Try again when all workers are upgraded.", field=field, retry_after=_UPGRADE_S)
