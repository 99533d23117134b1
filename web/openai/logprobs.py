"""Log-probabilities in the formats of chat completions and text completions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def chat_logprobs(entries: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the log-probabilities of a chat completion's tokens.

    Args:
        entries: log-probabilities as chunks of jobs have them (`web.schemas.jobs.TokenLogprob`).
    """
    return {"content": [_chat_token(entry) for entry in entries], "refusal": None}


def _chat_token(entry: Mapping[str, Any]) -> dict[str, Any]:
    alternatives = [{**_token(each), "bytes": _bytes(each)} for each in entry.get("top", ())]
    return {**_token(entry), "bytes": _bytes(entry), "top_logprobs": alternatives}


def _token(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {"token": entry["token"], "logprob": entry["logprob"]}


def _bytes(entry: Mapping[str, Any]) -> list[int]:
    return entry.get("bytes") or [*entry["token"].encode(errors="replace")]


def completion_logprobs(entries: Sequence[Mapping[str, Any]], offset: int = 0) -> dict[str, Any]:
    """Return the log-probabilities of a text completion's tokens.

    Args:
        offset: where the text of the first token begins in the completion.
    """
    offsets: list[int] = []
    for entry in entries:
        offsets.append(offset)
        offset += len(entry["token"])
    return {
        "tokens": [entry["token"] for entry in entries],
        "token_logprobs": [entry["logprob"] for entry in entries],
        "top_logprobs": [{each["token"]: each["logprob"] for each in entry.get("top", ())} for entry in entries],
        "text_offset": offsets,
    }
