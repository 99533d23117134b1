"""The prompts file: one request per line. Only one line is in memory at a time."""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

RESPONSES: Final = "/v1/responses"
OPENAI_URLS: Final = ("/v1/chat/completions", "/v1/completions", RESPONSES)
_TIERS: Final = {"batch": "flex", "high": "priority"}
"""OpenAI's service tier for each priority that is not the default."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A valid line."""

    line: int
    custom_id: str | None
    body: dict[str, Any]
    digest: str
    """Hash of the request and its line. It is the Idempotency-Key, and assigns a result to its prompt."""
    url: str = ""
    """Path of the route of OpenAI's API to which the body is sent; empty for `POST /v1/jobs`."""


@dataclass(frozen=True, slots=True)
class Malformed:
    """An invalid line."""

    line: int
    reason: str


def read_prompts(
    path: Path, defaults: Mapping[str, Any], run: str = "", max_bytes: int | None = None
) -> Iterator[Prompt | Malformed]:
    """Read the lines that are not empty, in order.

    Args:
        defaults: fields of requests that do not set them.
        run: name that is part of every digest, so that the same file can be sent again.
        max_bytes: read only lines that begin before this offset, because the file may grow meanwhile.
    """
    first_lines: dict[str, int] = {}  # custom_id → line
    offset = 0
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            if max_bytes is not None and offset >= max_bytes:
                return
            offset += len(raw)
            text = raw.removeprefix(codecs.BOM_UTF8) if line == 1 else raw
            if not text.strip():
                continue
            try:
                prompt = _prompt(line, _fields(text.rstrip(b"\r\n")), defaults, run)
                _reject_duplicate(prompt, first_lines)
                yield prompt
            except (ValueError, RecursionError) as error:
                yield Malformed(line, _reason(error))


def _reject_duplicate(prompt: Prompt, first_lines: dict[str, int]) -> None:
    if prompt.custom_id is not None:
        first = first_lines.setdefault(prompt.custom_id, prompt.line)
        if first != prompt.line:
            raise ValueError(f"has the `custom_id` {prompt.custom_id!r} of line {first}")


def _prompt(line: int, fields: dict[str, Any], defaults: Mapping[str, Any], run: str) -> Prompt:
    own_id = fields.pop("id", None)
    custom_id = _name(fields.pop("custom_id", own_id))
    if "body" in fields:
        return _openai_prompt(line, custom_id, fields, defaults, run)
    if "prompt" not in fields and "messages" not in fields:
        raise ValueError("needs `prompt` or `messages`")
    body = {**defaults, **fields}
    # Includes the line number: the same prompt on two lines is two jobs.
    identity = json.dumps([run, line, custom_id, body], separators=(",", ":"))
    return Prompt(line, custom_id, body, digest(identity))


def _openai_prompt(
    line: int, custom_id: str | None, fields: dict[str, Any], defaults: Mapping[str, Any], run: str
) -> Prompt:
    """Parse a line in the format of OpenAI's batches."""
    url, body = fields.get("url"), fields["body"]
    if url not in OPENAI_URLS:
        raise ValueError(f"needs `url`: one of {', '.join(OPENAI_URLS)}")
    if fields.get("method", "POST") != "POST":
        raise ValueError("needs `method` POST")
    if not isinstance(body, dict):
        raise ValueError("has a `body` that is not a JSON object")
    if unknown := fields.keys() - {"method", "url", "body"}:
        raise ValueError(f"has the unknown field `{min(unknown)}`")
    tier = _TIERS.get(str(defaults.get("priority")))
    given = {name: value for name, value in defaults.items() if name != "priority"}
    if url == RESPONSES:
        given = {"max_output_tokens" if name == "max_tokens" else name: value for name, value in given.items()}
        given["store"] = False
    body = {**given, **({"service_tier": tier} if tier else {}), **body}
    identity = json.dumps([run, line, custom_id, url, body], separators=(",", ":"))
    return Prompt(line, custom_id, body, digest(identity), url)


def digest(text: str) -> str:
    """Return a hash of 128 bits as hex digits."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _fields(raw: bytes) -> dict[str, Any]:
    data = json.loads(raw.decode(), parse_constant=_reject_constant)
    if isinstance(data, str):
        return {"prompt": data}
    if not isinstance(data, dict):
        raise ValueError("is neither a JSON object nor a string")
    return data


def _name(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise ValueError("`custom_id` must be a string or an integer")


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _reason(error: Exception) -> str:
    match error:
        case json.JSONDecodeError():
            return f"is not JSON ({error.msg} at column {error.colno})"
        case UnicodeDecodeError():
            return "is not UTF-8"
        case RecursionError():
            return "is nested too deeply"
    return str(error)
