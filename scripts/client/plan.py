"""What of the prompts is still to be done, given the results that are there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from scripts.client.progress import Tally
from scripts.client.prompts import Malformed, Prompt, digest
from scripts.client.results import Index, NotOurs, ResultFile
from scripts.client.runner import Task

Lines = Iterable[Prompt | Malformed]


def survey(lines: Lines, index: Index, *, retry_failed: bool, report: Callable[[Malformed], None]) -> Tally:
    """Read all lines once before anything is sent: report the malformed, count the rest.

    Raises:
        NotOurs: the results are those of other prompts.
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
        raise NotOurs("has results for lines that the prompts do not have")
    return tally


def tasks(lines: Lines, results: ResultFile, *, retry_failed: bool) -> Iterator[Task]:
    """What is to be sent, in order."""
    for line in lines:
        if isinstance(line, Malformed):
            continue
        if not results.index.has(line):
            yield Task(line, line.digest)
        elif retry_failed and results.index.has_failed(line.line):
            yield Task(line, _retry_key(line, results.read(line.line).id))


def _retry_key(prompt: Prompt, failed_job: str | None) -> str:
    """A key of its own, but the same one each time this failure is retried.

    What was never accepted has used up no key.
    """
    return digest(prompt.digest + failed_job) if failed_job else prompt.digest
