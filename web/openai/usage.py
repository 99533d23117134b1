"""What answers say about the jobs behind them: token counts and finish reasons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shared.jobs.record import Job


def usage(jobs: Sequence[Job], choices: int) -> dict[str, Any]:
    """Return the token counts of all choices together. A prompt counts once, however many choices it has.

    Args:
        jobs: the jobs of a request, in order.
        choices: number of jobs for each prompt.
    """
    prompts = jobs[::choices]
    prompt_tokens = sum(job.prompt_tokens or 0 for job in prompts)
    completion_tokens = sum(job.completion_tokens or 0 for job in jobs)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(job.cached_tokens or 0 for job in prompts)},
        "completion_tokens_details": {"reasoning_tokens": sum(job.reasoning_tokens or 0 for job in jobs)},
    }


def finish_reason(job: Job, *, calls_tools: bool = False) -> str:
    """Return why a job that succeeded ended. An answer that ends with tool calls asks for their results."""
    reason = job.finish_reason or "stop"
    return "tool_calls" if calls_tools and reason == "stop" else reason
