"""The request of a job, validated: what to generate, embed or rank."""

from __future__ import annotations

import base64
import json
import sys
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Self

from shared.wire import known_fields, to_json

GENERATE: Final = "generate"
EMBED: Final = "embedding"
RERANK: Final = "rerank"
"""Kinds of jobs. The last two are also kinds of models (`ModelCard.kind`)."""

SHARED_PREFIXES: Final = "shared"
"""Stands for an API key's id where cached prefixes are named that keys share (`share_system_prompt`)."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling parameters. Random numbers depend only on the seed and the token's position."""

    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Constraint:
    """A rule that the answer must satisfy. Tokens that would violate it are never sampled.

    Attributes:
        kind: `json_object`, `json_schema`, `regex`, `choice` or `grammar`.
        source: the JSON schema, the regular expression, a JSON list of the choices, or a Lark grammar; empty for
            `json_object`.
    """

    kind: str
    source: str = ""


@dataclass(frozen=True, slots=True)
class Request:
    """What to generate, from `prompt`, from `messages` or, if both are absent, from the job's stored token ids.

    Attributes:
        messages: input of the model's chat template. Each has a `role` (system, developer, user, assistant or tool) and
            `content` (text, a list of parts, or None next to tool calls). An assistant message may have
            `reasoning_content`, and `tool_calls` in OpenAI's form, whose arguments are JSON text; a tool message has
            `tool_call_id`.
        raw: whether `prompt` goes to the model as it is, not as a user message through the chat template. Where the
            prompt is tokenised, this is decided: only there it is certain whether the model has a template. True in
            records of earlier versions, which decided when they stored the job.
        parse: format in which the answer is parsed; see `web.results.job_views`.
        coordinates: what the coordinates in the answer refer to; see `shared.jobs.record.Parsing`.
        share_system_prompt: whether jobs of other API keys may reuse the cache of the leading system message.
        logprobs: number of alternatives (0 to 20) reported with each token's log-probability; None for no
            log-probabilities.
        tools: functions that the model may call, in OpenAI's form; None for none.
        tool_choice: `auto`, `none`, `required`, or `function:NAME` for a certain function.
        parallel_tool_calls: whether one answer may have several tool calls.
        template_variables: variables of the chat template in addition to the messages and the tools.
        continue_final: whether the answer continues the last message, which is from the assistant.
        thinking_budget: maximum reasoning tokens; None for no limit.
        constraint: a rule that the answer must satisfy.
        adapter: name of the LoRA adapter with which the model generates; None for none.
        logit_bias: pairs of a token id and the value that is added to its logit.
        kind: `GENERATE`, `EMBED` or `RERANK`. Jobs of the last two kinds have `inputs` and generate nothing.
        inputs: what to embed, each a text or token ids; or the documents to rank.
        query: what the documents are ranked for.
        instruction: how to judge the documents, for rerankers whose prompt has a place for it; None for the default.
        prompt_name: name of the model's prompt to put before each text; None for the model's default.
        dimensions: length of the vectors; None for all dimensions.
        truncate: whether inputs that are too long are cut.
    """

    model: str
    max_tokens: int
    sampling: Sampling
    prompt: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    stop: tuple[str, ...] = ()
    parse: str | None = None
    coordinates: str | None = None
    share_system_prompt: bool = False
    logprobs: int | None = None
    raw: bool = True
    tools: tuple[dict[str, Any], ...] | None = None
    tool_choice: str = "auto"
    parallel_tool_calls: bool = True
    template_variables: dict[str, Any] = field(default_factory=dict)
    continue_final: bool = False
    thinking_budget: int | None = None
    constraint: Constraint | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    adapter: str | None = None
    kind: str = GENERATE
    inputs: tuple[str | tuple[int, ...], ...] = ()
    query: str | None = None
    instruction: str | None = None
    prompt_name: str | None = None
    dimensions: int | None = None
    truncate: bool = False

    @property
    def image_parts(self) -> list[dict[str, Any]]:
        """The image parts of all messages, each with a digest (`image`), `width` and `height` in pixels."""
        contents = (message.get("content") for message in self.messages or ())  # newer processes may omit it
        parts = (part for content in contents if isinstance(content, list) for part in content)
        return [part for part in parts if part.get("type") == "image"]

    def to_json(self) -> str:
        """Encode as one line of JSON."""
        return to_json(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Parse the output of `to_json`, also that of another version."""
        data = known_fields(cls, json.loads(text))
        data["sampling"] = Sampling(**known_fields(Sampling, data["sampling"]))
        data["stop"] = tuple(data["stop"])
        for name in ("messages", "tools"):
            data[name] = None if data.get(name) is None else tuple(data[name])
        data["logit_bias"] = tuple((token, bias) for token, bias in data.get("logit_bias", ()))
        data["inputs"] = tuple(each if isinstance(each, str) else tuple(each) for each in data.get("inputs", ()))
        if constraint := data.get("constraint"):
            data["constraint"] = Constraint(**known_fields(Constraint, constraint))
        return cls(**data)


def pack_tokens(tokens: Sequence[int]) -> str:
    """Encode token ids as text: base64 of little-endian 32-bit integers."""
    packed = array("I", tokens)
    if sys.byteorder == "big":
        packed.byteswap()
    return base64.b64encode(packed.tobytes()).decode()


def unpack_tokens(text: str) -> tuple[int, ...]:
    """Decode the output of `pack_tokens`."""
    packed = array("I", base64.b64decode(text))
    if sys.byteorder == "big":
        packed.byteswap()
    return tuple(packed)
