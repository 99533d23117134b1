"""A Redis in this process, for what needs no server: it runs the real scripts."""

from __future__ import annotations

from typing import Any

import fakeredis


class FakeRedis(fakeredis.FakeRedis):
    """Text in and out, unless asked otherwise.

    It has no memory limit, and does not know the line that says what a script does at one.
    """

    def __init__(self, *, decode_responses: bool = True) -> None:
        super().__init__(decode_responses=decode_responses)

    def register_script(self, script: str) -> Any:  # type: ignore[override]
        first, _, rest = script.partition("\n")
        return super().register_script(rest if first.startswith("#!") else script)
