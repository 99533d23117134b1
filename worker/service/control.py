"""Celery remote-control commands that load and unload models on a running worker.

A command is queued and answered at once. Its operation (`shared.models.operations`) records the progress.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from celery.worker.control import control_command

from shared.queue.wakeups import LOAD, UNLOAD
from worker.service.switching import SwitchCommand

_handle: Callable[[SwitchCommand], object] | None = None


def set_handler(handle: Callable[[SwitchCommand], object]) -> None:
    """Pass all commands to `handle` from now on."""
    global _handle
    _handle = handle


@control_command(name=LOAD, args=[("operation", str), ("model", str)], signature="<operation> <model>")
def load_model(_state: Any, operation: str, model: str, replace: bool = False, pin: bool = False) -> dict[str, str]:
    """Load a model of the catalog, in addition to the loaded models or in place of them."""
    return _accept(SwitchCommand(operation, "load", model, replace, pin))


@control_command(name=UNLOAD, args=[("operation", str), ("model", str)], signature="<operation> <model>")
def unload_model(_state: Any, operation: str, model: str) -> dict[str, str]:
    """Drain a model and unload it."""
    return _accept(SwitchCommand(operation, "unload", model))


def _accept(command: SwitchCommand) -> dict[str, str]:
    if _handle is None:
        return {"error": "this worker is not ready to switch models"}
    _handle(command)
    return {"ok": "accepted"}
