"""Celery remote-control commands that load, unload and download models on a running worker.

A command is queued and answered at once. Its operation (`shared.models.operations`) records the progress.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from celery.worker.control import control_command

from shared.queue.wakeups import CANCEL_DOWNLOAD, DOWNLOAD, LOAD, UNLOAD
from worker.service.downloads import DownloadCommand, Downloads
from worker.service.switching import SwitchCommand

_handle: Callable[[SwitchCommand], object] | None = None
_downloads: Downloads | None = None


def set_handlers(handle: Callable[[SwitchCommand], object], downloads: Downloads) -> None:
    """Pass commands to load and unload models to `handle`, and those about downloads to `downloads`, from now on."""
    global _handle, _downloads
    _handle, _downloads = handle, downloads


@control_command(name=LOAD, args=[("operation", str), ("model", str)], signature="<operation> <model>")
def load_model(
    _state: Any, operation: str, model: str, replace: bool = False, pin: bool | None = None
) -> dict[str, str]:
    """Load a model of the catalog, in addition to the loaded models or in place of them."""
    return _accept(SwitchCommand(operation, "load", model, replace, pin))


@control_command(name=UNLOAD, args=[("operation", str), ("model", str)], signature="<operation> <model>")
def unload_model(_state: Any, operation: str, model: str) -> dict[str, str]:
    """Drain a model and unload it."""
    return _accept(SwitchCommand(operation, "unload", model))


@control_command(name=DOWNLOAD, args=[("operation", str), ("hub", str)], signature="<operation> <hub>")
def download_model(_state: Any, operation: str, hub: str, model: str, revision: str = "") -> dict[str, str]:
    """Download a model of the hub into the folder of the catalog."""
    if _downloads is None:
        return {"error": "this worker is not ready to download models"}
    _downloads.put(DownloadCommand(operation, hub, revision, model))
    return {"ok": "accepted"}


@control_command(name=CANCEL_DOWNLOAD, args=[("operation", str)], signature="<operation>")
def cancel_download(_state: Any, operation: str) -> dict[str, str]:
    """End a download, or take it out of the queue."""
    if _downloads is not None:
        _downloads.cancel(operation)
    return {"ok": "accepted"}


def _accept(command: SwitchCommand) -> dict[str, str]:
    if _handle is None:
        return {"error": "this worker is not ready to switch models"}
    _handle(command)
    return {"ok": "accepted"}
