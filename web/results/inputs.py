"""The answers of embedding and rerank jobs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from shared.jobs.inputs import numbers, result_lines
from shared.jobs.record import Job
from web.http.threadpool import run_in_threadpool
from web.schemas.inputs import EmbeddingRequest, RerankRequest


class IncompleteResults(Exception):
    """A job that succeeded lacks results."""


def embedding_list(body: EmbeddingRequest, job: Job, text: str) -> str:
    """Return the JSON of an `EmbeddingList`.

    Args:
        text: the job's text.
    """
    return run_in_threadpool(len(text), lambda: _embedding_list(body, job, text))


def rerank_view(body: RerankRequest, job: Job, text: str) -> str:
    """Return the JSON of a `RerankView`.

    Args:
        text: the job's text.
    """
    lines = _complete(text, len(body.documents))
    scores = [(numbers(lines[index])[0], index) for index in range(len(body.documents))]
    # Documents with equal scores keep their order.
    ranked = sorted(scores, key=lambda each: -each[0])[: body.top_n]
    results: list[dict[str, Any]] = [
        {
            "index": index,
            "relevance_score": score,
            "document": {"text": body.documents[index]} if body.return_documents else None,
        }
        for score, index in ranked
    ]
    view = {"id": job.id, "object": "list", "model": job.model, "results": results, "usage": _usage(job)}
    return json.dumps(view)


def _embedding_list(body: EmbeddingRequest, job: Job, text: str) -> str:
    lines = _complete(text, len(body.inputs))
    encode = json.dumps if body.encoding_format == "base64" else _number_list
    data = ",".join(
        f'{{"object":"embedding","index":{index},"embedding":{encode(lines[index])}}}' for index in range(len(lines))
    )
    rest = f'"model":{json.dumps(job.model)},"usage":{json.dumps(_usage(job))}'
    return f'{{"object":"list","data":[{data}],{rest}}}'


def _number_list(encoded: str) -> str:
    """Return numbers as a JSON list. Nine digits identify a 32-bit float."""
    return f"[{','.join(f'{number:.9g}' for number in numbers(encoded))}]"


def _complete(text: str, count: int) -> Mapping[int, str]:
    """Return the results of all inputs, by index."""
    lines = result_lines(text)
    if lines.keys() != set(range(count)):
        raise IncompleteResults(f"{len(lines)} of {count} results")
    return lines


def _usage(job: Job) -> dict[str, int]:
    tokens = job.prompt_tokens or 0
    return {"prompt_tokens": tokens, "total_tokens": tokens}
