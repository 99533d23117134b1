"""Jobs as a worker has them after a claim, without Redis."""

from __future__ import annotations

import time
from typing import Any
from unittest.mock import patch

from shared.jobs.record import Job, Priority, Status
from shared.jobs.request import Request, Sampling
from worker.engine.sequence import Said, Sequence
from worker.runner.base import Backend
from worker.runner.fake import FakeBackend


def claimed(prompt: str = "hello", *, attempt: int = 1, last_event: int = 2, **generation: Any) -> Job:
    """A job that was created a second ago and claimed now."""
    now = time.time()
    sampling = Sampling(temperature=0.0, seed=generation.pop("seed", 0))
    asked = Request(**{"model": "fake", "max_tokens": 8, "sampling": sampling, "prompt": prompt, **generation})
    return Job(
        id=f"job_{prompt}",
        owner="me",
        model="fake",
        status=Status.RUNNING,
        attempt=attempt,
        claimed_at="",
        priority=Priority.NORMAL,
        alone=False,
        generation=asked,
        metadata={},
        request_id="req",
        last_event=last_event,
        created_at=now - 1,
        started_at=now,
        finished_at=None,
        text=None,
        finish_reason=None,
        prompt_tokens=None,
        completion_tokens=None,
        cached_tokens=None,
        timings={},
        error_code=None,
        error_message=None,
    )


def sequence_for(job: Job, backend: Backend | None = None) -> Sequence:
    """A sequence with its prompt, ready for the engine."""
    backend = backend or FakeBackend()
    sequence = Sequence(job, backend)
    assert sequence.begin(backend.encode(job.generation, {})) is None
    return sequence


def run_alone(sequence: Sequence, backend: Backend) -> list[Said]:
    """All that a sequence says when nothing disturbs it."""
    backend.insert([sequence.row()])
    said: list[Said] = []
    while not (said and said[-1].ending):
        for _, token in backend.step().tokens:
            word = sequence.push(token)
            said += [word] if word else []
    backend.remove([sequence.uid])
    return said


def undisturbed(prompt: str, max_tokens: int) -> str:
    """The fake backend's whole text for a prompt; its pauses are left out."""
    backend = FakeBackend()
    sequence = sequence_for(claimed(prompt, max_tokens=max_tokens), backend)
    with patch("worker.runner.fake.sleep"):
        return text_of(run_alone(sequence, backend))


def text_of(said: list[Said]) -> str:
    """What a reader of the stream sees."""
    return "".join(word.text for word in said)
