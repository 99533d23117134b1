"""The logs of supervisord and its children."""

from __future__ import annotations

import json
import re
from pathlib import Path

_TAIL_BYTES = 20_000
_PROCESS_EVENT = re.compile(r"^\S+ \S+ \w+ ((?:exited|spawned|stopped|gave up|spawnerr): .*)$")
_CONSEQUENCE = "worker_process_died"
"""Event with which a launcher reports that its worker exited. The worker's own error, if any, explains more."""


def size(log: Path) -> int:
    """Return the size of a log in bytes; 0 if it does not exist."""
    return log.stat().st_size if log.exists() else 0


def last_error(log: Path, offset: int = 0) -> str:
    """Return the last error in a log, or its last line if there is none; of a JSON line, the event and its reason.

    Args:
        offset: where to begin, in bytes. Earlier lines belong to earlier runs.
    """
    lines = [_parse(line) for line in _tail(log, offset) if line.strip()]
    errors = [text for text, is_error in lines if is_error]
    causes = [text for text in errors if not text.startswith(_CONSEQUENCE)]
    return (causes or errors or [text for text, _ in lines] or [""])[-1]


def _tail(log: Path, offset: int) -> list[str]:
    try:
        end = size(log)
        with log.open("rb") as file:
            file.seek(max(0, end - _TAIL_BYTES, offset if offset <= end else 0))  # a smaller file was rotated
            return file.read().decode(errors="replace").split("\n")
    except OSError:
        return []


def _parse(line: str) -> tuple[str, bool]:
    """Return the text of a line, and whether it reports an error."""
    try:
        entry = json.loads(line)
        event = str(entry["message"])
        reason = entry.get("reason") or entry.get("exit") or str(entry.get("exc_info", "")).strip().rpartition("\n")[2]
        text = f"{event}: {reason}" if reason else event
        return text.strip().partition("\n")[0], entry.get("level") in ("ERROR", "CRITICAL")
    except (ValueError, KeyError, TypeError):
        return line.strip(), False


class SupervisorLog:
    """Follows supervisord's log."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = size(path)

    def read_events(self) -> list[str]:
        """Return the starts and exits of children since the last call, in supervisord's words."""
        end = size(self._path)
        if end < self._offset:  # rotated
            self._offset = 0
        if end == self._offset:
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        complete = data[: data.rfind(b"\n") + 1]
        self._offset += len(complete)
        matches = map(_PROCESS_EVENT.match, complete.decode(errors="replace").splitlines())
        return [match.group(1) for match in matches if match]
