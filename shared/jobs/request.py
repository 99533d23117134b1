"""What a job is asked to generate."""

from __future__ import annotations

import base64
import json
import sys
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from shared.wire import known, to_json


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. Randomness is a function of (seed, position) alone."""

    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Request:
    """What to generate: `prompt`, or `messages` for the model's chat template."""

    model: str
    max_tokens: int
    sampling: Sampling
    prompt: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    stop: tuple[str, ...] = ()
    parse: str | None = None
    """What its text is to be read as; see `web.results.job_views`."""
    share_system_prompt: bool = False
    """Whether jobs of other API keys may reuse what the model's cache has of the leading system message."""
    logprobs: int | None = None
    """None: no log-probabilities; else the number of alternatives (0 to 20) beside each chosen token."""

    @property
    def image_parts(self) -> list[dict[str, Any]]:
        """The images of its messages in their order: of each the digest (`image`), `width` and `height` in pixels."""
        contents = (message.get("content") for message in self.messages or ())  # a newer process may write none
        parts = (part for content in contents if isinstance(content, list) for part in content)
        return [part for part in parts if part.get("type") == "image"]

    def to_json(self) -> str:
        """One line of JSON."""
        return to_json(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote, here or in another version."""
        data = known(cls, json.loads(text))
        data["sampling"] = Sampling(**known(Sampling, data["sampling"]))
        data["stop"] = tuple(data["stop"])
        data["messages"] = None if data["messages"] is None else tuple(data["messages"])
        return cls(**data)


def pack_tokens(tokens: Sequence[int]) -> str:
    """Token ids as text: base64 of little-endian 32-bit numbers."""
    packed = array("I", tokens)
    if sys.byteorder == "big":
        packed.byteswap()
    return base64.b64encode(packed.tobytes()).decode()


def unpack_tokens(text: str) -> tuple[int, ...]:
    """The opposite of `pack_tokens`."""
    packed = array("I", base64.b64decode(text))
    if sys.byteorder == "big":
        packed.byteswap()
    return tuple(packed)
