"""A worker's engine without queue and network, for the parts of the bench that run in process.

MLX must not be imported before OpenBLAS is loaded, so imports that need it are inside functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from shared.jobs.request import Request, Sampling
from shared.queue.claims import ClaimedJob

if TYPE_CHECKING:
    from worker.engine.core import EngineCore
    from worker.engine.sequence import Sequence as RunningSequence
    from worker.engine.sequence import SequenceOutput
    from worker.runner.model_runner import MLXRunner

GREEDY = Sampling(temperature=0.0)
SMOLLM2 = "SmolLM2-135M-Instruct"
"""Folder of the default model; `scripts.model_files.default_model` has the same name, but imports MLX."""


def load_runner(folder: Path, speculation_tokens: int = 0, memory_bytes: int = 4 * 2**30) -> MLXRunner:
    """The runner of a text model, warmed up; a quarter of the memory is for prefixes."""
    from worker.models.load import load_model
    from worker.runner import cpu_attention
    from worker.runner.memory import Memory
    from worker.runner.model_runner import MLXRunner, default_chunk

    cpu_attention.install()
    memory = Memory(memory_bytes, memory_bytes // 4)
    runner = MLXRunner(load_model(folder), default_chunk(), memory, speculation_tokens=speculation_tokens)
    for _ in runner.warming():
        pass
    return runner


class InProcess:
    """An engine that the caller steps.

    Args:
        load: whether to load the engine here; False for one that an engine thread opens, which loads it.

    Attributes:
        outputs: the outputs of the last step.
    """

    def __init__(self, runner: MLXRunner, slots: int = 64, *, load: bool = True) -> None:
        from worker.engine.core import EngineCore

        self.runner = runner
        self.outputs: list[SequenceOutput] = []
        self.core: EngineCore = EngineCore(lambda: runner, slots, self.outputs.extend)
        if load:
            self.core.load()
        self._jobs = 0

    def submit(
        self, prompt: Sequence[int], max_tokens: int, sampling: Sampling = GREEDY, owner: str = "bench"
    ) -> RunningSequence:
        """Add a row with this prompt."""
        return self.submit_request(prompt, Request(self.runner.card.id, max_tokens, sampling, prompt=""), owner=owner)

    def submit_request(
        self,
        prompt: Sequence[int],
        request: Request,
        images: Mapping[str, bytes] = MappingProxyType({}),
        owner: str = "bench",
    ) -> RunningSequence:
        """Add a row with this prompt and the options of a request; `images` are files by digest."""
        from worker.engine.sequence import Sequence as RunningSequence

        self._jobs += 1
        claimed = _claimed(self._jobs, request, owner)
        sequence = RunningSequence(claimed, self.runner.prompt(prompt, 0, request, images), self.runner)
        self.core.submit(sequence)
        return sequence

    def step(self) -> list[SequenceOutput]:
        """Run one step; its outputs."""
        self.outputs.clear()
        self.core.step()
        return list(self.outputs)

    def stop(self, sequences: Sequence[RunningSequence]) -> None:
        """Cancel rows; the next step removes them."""
        from shared.queue.claims import WriteResult

        for sequence in sequences:
            self.core.apply_write_result(sequence.job.id, sequence.job.attempt, WriteResult.CANCELLED)

    def clear(self, sequences: Sequence[RunningSequence]) -> None:
        """Remove these rows and all cached prefixes."""
        self.stop(sequences)
        self.step()
        self.runner.reset()


def _claimed(number: int, request: Request, owner: str) -> ClaimedJob:
    from shared.jobs.record import Job

    record: dict[str, Any] = {
        **dict.fromkeys(("owner", "request_id"), owner),
        "id": f"job_{number}",
        "model": request.model,
        "status": "queued",
        "attempt": "1",
        "class": "1",
        "metadata": "{}",
        "seq": "1",
        "created_at": "0",
    }
    return ClaimedJob(Job.from_record(record), request, (), 0, float(number), 0.0)
