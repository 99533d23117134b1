"""Claimed jobs, sequences and their undisturbed output, without Redis."""

from __future__ import annotations

import time
from typing import Any
from unittest.mock import patch

from shared.jobs.record import Job, Priority, Status
from shared.jobs.request import Request, Sampling
from shared.queue.claims import ClaimedJob
from worker.engine.output import OutputProcessor
from worker.engine.sequence import Sequence, SequenceOutput
from worker.runner.base import ModelRunner, PrefillWork, Prompt, StepPlan
from worker.runner.fake import FakeRunner


def claimed(
    prompt: str = "hello",
    *,
    attempt: int = 1,
    last_event: int = 2,
    owner: str = "me",
    rank: float = 0.0,
    started_after_s: float | None = None,
    priority: Priority = Priority.NORMAL,
    **request: Any,
) -> ClaimedJob:
    """Return a job that was created a second ago and claimed now.

    Args:
        started_after_s: seconds from its creation to its first attempt, if it had one.
    """
    now = time.time()
    sampling = request.pop("sampling", Sampling(temperature=0.0, seed=request.pop("seed", 0)))
    built = Request(**{"model": "fake", "max_tokens": 8, "sampling": sampling, "prompt": prompt, **request})
    job = Job(
        id=f"job_{prompt}",
        owner=owner,
        model="fake",
        status=Status.QUEUED,
        attempt=attempt,
        claimed_at="",
        priority=priority,
        metadata={},
        request_id="req",
        last_event=last_event,
        created_at=now - 1,
        started_at=None if started_after_s is None else now - 1 + started_after_s,
        finished_at=None,
        finish_reason=None,
        prompt_tokens=None,
        completion_tokens=None,
        cached_tokens=None,
        timings={},
        error_code=None,
        error_message=None,
    )
    return ClaimedJob(job, built, None, 0, rank, 1.0)


def prompt_of(claimed: ClaimedJob, runner: ModelRunner) -> Prompt:
    """Return the prompt of a job, tokenised by the (fake) runner."""
    return runner.prompt(runner.tokenize(claimed.request) or [], 0, claimed.request, {})


def sequence_for(claimed: ClaimedJob, runner: ModelRunner | None = None, **more: Any) -> Sequence:
    """Return a sequence with its prompt, ready for the engine."""
    runner = runner or FakeRunner()
    return Sequence(claimed, prompt_of(claimed, runner), runner, **more)


def run_alone(sequence: Sequence, runner: ModelRunner) -> list[SequenceOutput]:
    """Return the output of a sequence that runs alone, without its start."""
    outputs = OutputProcessor(runner.eos)
    runner.insert([sequence.row()])
    published: list[SequenceOutput] = []
    while sequence.ending is None:
        plan = StepPlan(prefill=PrefillWork((sequence.uid,))) if runner.prefillable() else StepPlan()
        published += outputs.process({sequence.uid: sequence}, runner.execute(plan).tokens)
    runner.remove([sequence.uid])
    return published


def undisturbed(prompt: str, max_tokens: int) -> str:
    """Return the fake runner's whole text for a prompt, without its pauses."""
    runner = FakeRunner()
    sequence = sequence_for(claimed(prompt, max_tokens=max_tokens), runner)
    with patch("worker.runner.fake.sleep"):
        return text_of(run_alone(sequence, runner))


def text_of(published: list[SequenceOutput]) -> str:
    """Return the text that a reader of the stream gets."""
    return "".join(output.text for output in published)
