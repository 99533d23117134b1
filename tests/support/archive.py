"""Jobs for tests of the archive."""

from __future__ import annotations

from web.archive.tables import ArchivedJob


def archived(
    number: int,
    owner: str = "a",
    *,
    created_at: float | None = None,
    status: str = "succeeded",
    model: str = "m",
    metadata: str = "{}",
    priority: int = 1,
    request: str | None = '{"model": "m"}',
    text: str | None = "the text",
) -> ArchivedJob:
    """Return an ended job; later numbers are newer."""
    at = 1000.0 + number if created_at is None else created_at
    record = {
        "id": f"job_{number:028x}",
        "owner": owner,
        "model": model,
        "status": status,
        "class": str(priority),
        "attempt": "1",
        "metadata": metadata,
        "request_id": "r",
        "seq": "4",
        "created_at": f"{at:.6f}",
        "started_at": f"{at + 1:.6f}",
        "finished_at": f"{at + 2:.6f}",
        "prompt_tokens": "3",
        "completion_tokens": "2",
        "webhook": "secret",
    }
    return ArchivedJob.of(record, request, text)
