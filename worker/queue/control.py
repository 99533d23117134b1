"""Celery's remote control: the commands by which models are switched on a running worker.

They queue the order and answer at once; its operation (`shared.models.operations`) has the progress.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from celery.worker.control import control_command

from shared.queue.wakeups import LOAD, UNLOAD
from worker.models.switching import Order

_put: Callable[[Order], object] | None = None


def take_orders(put: Callable[[Order], object]) -> None:
    """Pass all orders from now on to `put`."""
    global _put
    _put = put


@control_command(name=LOAD, args=[("operation", str), ("model", str)], signature="<operation> <model>")
def load_model(_state: Any, operation: str, model: str, replace: bool = False, pin: bool = False) -> dict[str, str]:
    """Load a model of the catalog, beside the loaded models or in their place."""
    return _order(Order(operation, "load", model, replace, pin))


@control_command(name=UNLOAD, args=[("operation", str), ("model", str)], signature="<operation> <model>")
def unload_model(_state: Any, operation: str, model: str) -> dict[str, str]:
    """Drain a model and unload it."""
    return _order(Order(operation, "unload", model))


def _order(order: Order) -> dict[str, str]:
    if _put is None:
        return {"error": "this worker is not ready to switch models"}
    _put(order)
    return {"ok": "accepted"}
