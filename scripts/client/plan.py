"""Compares the prompts with existing results to find the remaining tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from scripts.client.progress import Tally
from scripts.client.prompts import Malformed, Prompt, digest
from scripts.client.results import Index, ResultFile, ResultsMismatch
from scripts.client.runner import Task

Lines = Iterable[Prompt | Malformed]


def scan(lines: Lines, index: Index, *, retry_failed: bool, report: Callable[[Malformed], None]) -> Tally:
    """Count the prompts and their results, and report malformed lines, before anything is sent.

    Raises:
        ResultsMismatch: the results belong to other prompts.
    """
    tally = Tally(total=0)
    matched = 0
    for line in lines:
        if isinstance(line, Malformed):
            tally.malformed += 1
            report(line)
            continue
        tally.total += 1
        if index.has(line):
            matched += 1
            failed = index.has_failed(line.line)
            tally.done += not (failed and retry_failed)
            tally.failed += failed and not retry_failed
    if matched < index.count:
        raise ResultsMismatch("has results for lines that are not in the prompts file")
    return tally


def tasks(lines: Lines, results: ResultFile, *, retry_failed: bool) -> Iterator[Task]:
    """Generate the tasks to send, in the order of the prompts."""
    for line in lines:
        if isinstance(line, Malformed):
            continue
        if not results.index.has(line):
            yield Task(line, line.digest)
        elif retry_failed and results.index.has_failed(line.line):
            yield Task(line, _retry_key(line, results.read(line.line).id))


def _retry_key(prompt: Prompt, failed_job: str | None) -> str:
    """Return the Idempotency-Key of a retry: another one than the failed job's, and the same each time.

    A prompt that was never accepted keeps its first key.
    """
    return digest(prompt.digest + failed_job) if failed_job else prompt.digest
