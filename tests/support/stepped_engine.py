"""An engine on the fake runner that a test steps by hand."""

from __future__ import annotations

from typing import Any

from shared.jobs.record import Ending
from tests.plugins.work import claimed, run_alone, sequence_for, text_of
from worker.engine.core import EngineCore
from worker.engine.sequence import Sequence, SequenceOutput
from worker.runner.fake import FakeRunner


class SteppedEngine:
    """An engine that a test steps by hand, and its output."""

    def __init__(self, slots: int = 4, reserve: int = 0, **runner: Any) -> None:
        self.runner = FakeRunner(**runner)
        self.published: list[SequenceOutput] = []
        self.traced: list[list[str]] = []
        self.core = EngineCore(
            lambda: self.runner, slots, self.published.extend, trace=self.traced.append, reserve=reserve
        )
        self.core.load()

    def submit(self, prompt: str, **request: Any) -> Sequence:
        """Submit a request."""
        sequence = sequence_for(claimed(prompt, **request), self.runner)
        self.core.submit(sequence)
        return sequence

    def run(self) -> None:
        """Step until no row is left."""
        self.core.step()
        while self.core.busy:
            self.core.step()

    def ending(self, sequence: Sequence) -> Ending:
        """Return how a sequence ended. Check that it started at most once, before all other output."""
        assert sequence.ending is not None
        outputs = [output for output in self.published if output.sequence is sequence]
        assert [output.started for output in outputs] == [bool(outputs[0].started), *[False] * (len(outputs) - 1)]
        return sequence.ending

    def text(self, sequence: Sequence) -> str:
        """Return the published text of a sequence."""
        return text_of([output for output in self.published if output.sequence is sequence])


def alone(prompt: str, **request: Any) -> str:
    """Return the text of a request that runs alone."""
    runner = FakeRunner()
    return text_of(run_alone(sequence_for(claimed(prompt, **request), runner), runner))
