"""An in-process Redis that runs the real scripts."""

from __future__ import annotations

from typing import Any

import fakeredis


class FakeRedis(fakeredis.FakeRedis):
    """A fake Redis that returns text by default.

    It has no memory limit, and does not support the `#!lua` line with a script's flags, which is removed.
    """

    def __init__(self, *, decode_responses: bool = True) -> None:
        super().__init__(decode_responses=decode_responses)

    def register_script(self, script: str) -> Any:  # type: ignore[override]
        first_line, _, rest = script.partition("\n")
        return super().register_script(rest if first_line.startswith("#!") else script)
