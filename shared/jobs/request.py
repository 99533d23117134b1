"""What a job is asked to generate."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Self

from shared.wire import known


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
    """What is to be generated: `prompt`, or `messages` for the model's chat template."""

    model: str
    max_tokens: int
    sampling: Sampling
    prompt: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    stop: tuple[str, ...] = ()
    parse: str | None = None
    """What its text is to be read as; see `web.views`."""
    share_system_prompt: bool = False
    """Whether jobs of other API keys may reuse what the model's cache has of the leading system message."""

    @property
    def image_parts(self) -> list[dict[str, Any]]:
        """The images of its messages in their order: of each the digest (`image`), `width` and `height` in pixels."""
        contents = (message["content"] for message in self.messages or ())
        parts = (part for content in contents if isinstance(content, list) for part in content)
        return [part for part in parts if part["type"] == "image"]

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote, here or in another version."""
        data = known(cls, json.loads(text))
        data["sampling"] = Sampling(**known(Sampling, data["sampling"]))
        data["stop"] = tuple(data["stop"])
        data["messages"] = None if data["messages"] is None else tuple(data["messages"])
        return cls(**data)
