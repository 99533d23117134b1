"""Publishes the progress of an operation, which continues while Redis is unreachable."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Final, TypeVar

from redis import RedisError

from shared.models.operations import Operation, Operations, OperationState
from shared.redis.client import passes

logger = logging.getLogger(__name__)

PUBLISH_EVERY_S: Final = 0.5
"""Time between two publications of an operation's progress, and between two tries while Redis is unreachable."""
RETRY_LIMIT_S: Final = 120.0
"""Longest time for which the end of an operation is retried while Redis is unreachable."""

T = TypeVar("T")


class OperationProgress:
    """Publishes the states of one operation."""

    def __init__(self, operations: Operations, operation: Operation) -> None:
        self._operations = operations
        self._operation = operation

    def publish(self, state: OperationState, **fields: object) -> None:
        """Publish a state. If it is final, this is retried until Redis answers.

        Args:
            fields: new values of other fields of the operation.

        Raises:
            redis.RedisError: a final state could not be published.
        """
        self._operation = replace(self._operation, state=state, **fields)  # type: ignore[arg-type]
        if state.terminal:
            retry(lambda: self._operations.put(self._operation))
            return
        try:
            self._operation = self._operations.put(self._operation)
        except RedisError as error:
            log_unpublished(self._operation.id, error)

    def add_unloaded(self, model: str) -> None:
        """Record a model that was unloaded, for the next publication."""
        self._operation = replace(self._operation, unloaded=(*self._operation.unloaded, model))


def log_unpublished(operation: str, error: RedisError) -> None:
    """Log that the state of an operation could not be published."""
    logger.warning("operation_not_published", extra={"operation": operation, "reason": str(error)})


def retry(call: Callable[[], T]) -> T:
    """Call until Redis answers.

    Raises:
        redis.RedisError: Redis was unreachable for `RETRY_LIMIT_S`, or rejects the call.
    """
    until = time.monotonic() + RETRY_LIMIT_S
    while True:
        try:
            return call()
        except RedisError as error:
            if not passes(error) or time.monotonic() > until:
                raise
            time.sleep(PUBLISH_EVERY_S)
