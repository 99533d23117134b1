"""Reading what supervisord and the children wrote."""

from __future__ import annotations

import json
import re
from pathlib import Path

_TAIL_BYTES = 20_000
_NEWS = re.compile(r"^\S+ \S+ \w+ ((?:exited|spawned|stopped|gave up|spawnerr): .*)$")


def last_line(log: Path) -> str:
    """The last line of a program's log, the last error if there is one: of a JSON line its event and the reason."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").split("\n")
    except OSError:
        return ""
    parsed = [_message(line) for line in lines if line.strip()]
    errors = [text for text, is_error in parsed if is_error]
    return (errors or [text for text, _ in parsed] or [""])[-1]


def _message(line: str) -> tuple[str, bool]:
    try:
        entry = json.loads(line)
        event = str(entry["message"])
        reason = entry.get("reason") or entry.get("exit")
        text = f"{event}: {reason}" if reason else event
        return text.strip().partition("\n")[0], entry.get("level") in ("ERROR", "CRITICAL")
    except (ValueError, KeyError, TypeError):
        return line.strip(), False


class SupervisorLog:
    """Follows supervisord's log for what became of the children."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = path.stat().st_size if path.exists() else 0

    def news(self) -> list[str]:
        """Starts and ends since the last call, as supervisord put them."""
        size = self._path.stat().st_size if self._path.exists() else 0
        if size < self._offset:  # rotated
            self._offset = 0
        if size == self._offset:
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        matches = map(_NEWS.match, whole.decode(errors="replace").splitlines())
        return [match.group(1) for match in matches if match]
