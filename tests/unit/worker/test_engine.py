"""The engine thread loads, steps and unloads several models in turns."""

from __future__ import annotations

import gc
import itertools
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Generator, Iterator

import pytest

from shared.jobs.record import Status
from shared.models.folder import ModelError
from tests.plugins.work import claimed, sequence_for
from worker.engine.core import EngineCore
from worker.engine.engine import EngineThread
from worker.engine.loading import Unloaded
from worker.engine.sequence import Outcome, Sequence, SequenceOutput
from worker.runner.base import ModelRunner, StepOutput, StepPlan
from worker.runner.fake import FakeRunner


class Harness:
    """An engine thread and the output of its models."""

    def __init__(self, deaths: list[str] | None = None) -> None:
        self.published: list[SequenceOutput] = []
        self.engine = EngineThread((deaths if deaths is not None else []).append)

    def core(self, load: Callable[[], ModelRunner | Generator[float, None, ModelRunner]] = FakeRunner) -> EngineCore:
        return EngineCore(load, 4, self.published.extend, self.engine.wake)

    def loaded(self, load: Callable[[], ModelRunner | Generator[float, None, ModelRunner]] = FakeRunner) -> EngineCore:
        core = self.core(load)
        self.engine.load(core)
        core.loaded.result(5)
        return core


@pytest.fixture
def harness() -> Iterator[Harness]:
    harness = Harness()
    harness.engine.start()
    yield harness
    harness.engine.close()
    harness.engine.join(5)
    assert not harness.engine.is_alive()


def submitted(core: EngineCore, prompt: str = "row", **more: object) -> Sequence:
    sequence = sequence_for(claimed(prompt, **more), core.loaded.result())  # type: ignore[arg-type]
    core.submit(sequence)
    return sequence


def test_an_idle_engine_wakes_up_for_a_submitted_row(harness: Harness, eventually: Callable[..., None]) -> None:
    core = harness.loaded()
    steps = core.totals.steps
    submitted(core, max_tokens=2)
    eventually(lambda: harness.published and harness.published[-1].ending)
    assert core.totals.steps == steps + 2
    assert time.monotonic() - core.progress_at < 5


def test_only_the_engine_thread_reads_gauges_also_while_it_is_idle(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, eventually: Callable[..., None]
) -> None:
    readers: list[str] = []

    def stats(_: FakeRunner) -> dict[str, float]:
        readers.append(threading.current_thread().name)
        return {"readings": len(readers)}

    monkeypatch.setattr("worker.engine.meters.GAUGES_S", 0.01)
    monkeypatch.setattr(FakeRunner, "stats", stats)
    core = harness.loaded()
    eventually(lambda: core.totals.gauges.get("readings", 0) > 3)
    assert set(readers) == {"engine"}


def test_gauges_are_read_while_only_another_model_has_work(monkeypatch: pytest.MonkeyPatch) -> None:
    readings: list[FakeRunner] = []

    def stats(runner: FakeRunner) -> dict[str, float]:
        readings.append(runner)
        return {}

    monkeypatch.setattr("worker.engine.meters.GAUGES_S", 0.0)
    monkeypatch.setattr(FakeRunner, "stats", stats)
    harness = Harness()
    idle, busy = harness.core(), harness.core()
    for core in (idle, busy):
        harness.engine.load(core)
    harness.engine.turn()
    submitted(busy, max_tokens=1000)
    readings.clear()
    for _ in range(5):
        harness.engine.turn()
    assert readings.count(idle.runner) >= 5, "the gauges of both models include the memory of the process"


def test_a_failed_loading_is_reported_and_the_other_models_continue(
    harness: Harness, eventually: Callable[..., None]
) -> None:
    good = harness.loaded()

    def load() -> FakeRunner:
        raise OSError("no such folder")

    def load_halfway() -> Generator[float, None, ModelRunner]:
        yield 0.5
        raise OSError("no such file")

    for loader, message in ((load, "no such folder"), (load_halfway, "no such file")):
        bad = harness.core(loader)
        harness.engine.load(bad)
        with pytest.raises(OSError, match=message):
            bad.loaded.result(5)
    submitted(good, max_tokens=2)
    eventually(lambda: harness.published and harness.published[-1].ending)
    assert harness.engine.cores == (good,)


def test_the_memory_of_a_failed_loading_is_free_when_the_failure_is_reported(harness: Harness) -> None:
    class Weights:
        pass

    read: list[weakref.ref[Weights]] = []

    def use(weights: Weights) -> None:
        raise OSError(f"{type(weights).__name__} are cut")

    def load() -> Generator[float, None, ModelRunner]:
        weights = Weights()
        read.append(weakref.ref(weights))
        yield 0.5
        try:
            use(weights)
        except OSError as error:
            raise ModelError("it does not load") from error

    freed: list[bool] = []
    bad = harness.core(load)
    bad.loaded.add_done_callback(lambda _: freed.append(read[0]() is None))
    gc.disable()  # the memory must not stay in use until the next collection
    try:
        harness.engine.load(bad)
        error = bad.loaded.exception(5)
    finally:
        gc.enable()
    assert freed == [True], "the previous models are loaded again and need the memory"
    assert isinstance(error, ModelError)
    assert "use(weights)" in "".join(traceback.format_exception(error)), (
        "the traceback still shows where loading failed"
    )


def test_the_death_of_the_engine_thread_is_reported() -> None:
    deaths: list[str] = []
    harness = Harness(deaths)
    core = EngineCore(FakeRunner, 1, lambda output: 1 / 0, harness.engine.wake)
    harness.engine.start()
    harness.engine.load(core)
    core.loaded.result(5)
    submitted(core)
    harness.engine.join(5)
    assert deaths == ["its engine thread died (ZeroDivisionError)"]


def test_a_model_loads_in_pieces_while_another_generates(harness: Harness, eventually: Callable[..., None]) -> None:
    busy = harness.loaded()
    submitted(busy, max_tokens=100_000)
    eventually(lambda: busy.totals.tokens > 10)
    seen: list[int] = []

    def load() -> Generator[float, None, ModelRunner]:
        for piece in range(10):
            seen.append(busy.totals.tokens)
            yield piece / 10
        return FakeRunner()

    loaded = harness.loaded(load)
    assert loaded.load_progress == 1.0
    assert all(later > earlier for earlier, later in itertools.pairwise(seen))
    busy.drain(0)
    eventually(lambda: not busy.busy)


class Slow(FakeRunner):
    """A runner whose steps advance a clock."""

    def __init__(self, clock: list[float], seconds: float) -> None:
        super().__init__()
        self.clock, self.seconds = clock, seconds

    def execute(self, plan: StepPlan) -> StepOutput:
        self.clock[0] += self.seconds
        return super().execute(plan)


def test_models_get_equal_time_however_long_their_steps_are(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("worker.engine.engine.time.perf_counter", lambda: clock[0])
    harness = Harness()
    quick, slow = (harness.core(lambda seconds=seconds: Slow(clock, seconds)) for seconds in (1.0, 5.0))
    for core in (quick, slow):
        harness.engine.load(core)
        harness.engine.turn()
        submitted(core, max_tokens=1000)
    steps = [(quick.totals.steps, slow.totals.steps)]
    for _ in range(120):
        harness.engine.turn()
        steps.append((quick.totals.steps, slow.totals.steps))
    assert quick.totals.steps == pytest.approx(100, abs=2)
    assert slow.totals.steps == pytest.approx(20, abs=2)
    assert max(abs(fast - 5 * slower) for fast, slower in steps) <= 6, (
        "no model waits for more than a step of the other"
    )


def test_a_models_clock_stands_still_while_others_step_or_load(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("worker.engine.engine.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr("worker.engine.core.time.monotonic", lambda: clock[0])
    harness = Harness()
    quick, slow = (harness.core(lambda seconds=seconds: Slow(clock, seconds)) for seconds in (1.0, 5.0))
    for core in (quick, slow):
        harness.engine.load(core)
        harness.engine.turn()
        submitted(core, max_tokens=1000)
    steps = quick.totals.steps, slow.totals.steps
    before = quick.clock(), slow.clock()
    for _ in range(120):
        harness.engine.turn()
    assert quick.clock() - before[0] == (quick.totals.steps - steps[0]) * 1.0
    assert slow.clock() - before[1] == (slow.totals.steps - steps[1]) * 5.0

    def load() -> Generator[float, None, ModelRunner]:
        for _ in range(3):
            clock[0] += 100.0
            yield 0.5
        return FakeRunner()

    before = quick.clock(), slow.clock()
    harness.engine.load(harness.core(load))
    for _ in range(4):
        harness.engine.turn()
    assert quick.clock() - before[0] < 100.0
    assert slow.clock() - before[1] < 100.0


def test_idle_time_earns_no_credit(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("worker.engine.engine.time.perf_counter", lambda: clock[0])
    harness = Harness()
    first, second = (harness.core(lambda: Slow(clock, 1.0)) for _ in range(2))
    for core in (first, second):
        harness.engine.load(core)
        harness.engine.turn()
    submitted(first, max_tokens=1000)
    for _ in range(100):
        harness.engine.turn()
    before = first.totals.steps
    submitted(second, max_tokens=1000)
    for _ in range(20):
        harness.engine.turn()
    assert first.totals.steps - before == pytest.approx(10, abs=1)


def test_a_model_that_is_loaded_later_has_no_credit(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("worker.engine.engine.time.perf_counter", lambda: clock[0])
    harness = Harness()
    first, late = (harness.core(lambda: Slow(clock, 1.0)) for _ in range(2))
    harness.engine.load(first)
    harness.engine.turn()
    submitted(first, max_tokens=100)
    for _ in range(110):
        harness.engine.turn()
    assert first.idle
    harness.engine.load(late)
    harness.engine.turn()
    for core in (late, first):
        submitted(core, max_tokens=1000)
    before = first.totals.steps
    for _ in range(20):
        harness.engine.turn()
    assert first.totals.steps - before == pytest.approx(10, abs=1)


def test_rows_that_wait_for_memory_take_no_time_from_other_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.engine.engine.time.perf_counter", itertools.count().__next__)
    harness = Harness()
    starved, other = harness.core(lambda: FakeRunner(memory=10)), harness.core()
    for core in (starved, other):
        harness.engine.load(core)
    harness.engine.turn()
    starved.set_cache_limit(3, 1000)
    waits = submitted(starved, max_tokens=2)
    submitted(other, max_tokens=1000)
    for _ in range(20):
        harness.engine.turn()
    assert (starved.busy, starved.idle) == (True, True)
    assert other.totals.steps >= 19
    harness.engine.call_soon(lambda: starved.set_cache_limit(100))
    for _ in range(60):
        harness.engine.turn()
    assert waits.ending and waits.ending.status is Status.SUCCEEDED
    assert starved.idle


def test_an_unloaded_model_is_removed_and_the_others_continue(
    harness: Harness, eventually: Callable[..., None]
) -> None:
    staying, unloaded = harness.loaded(), harness.loaded()
    done = threading.Event()
    harness.engine.unload(unloaded, done.set)
    assert done.wait(5)
    assert harness.engine.cores == (staying,)
    assert isinstance(unloaded.loaded.exception(), Unloaded)
    submitted(staying, max_tokens=2)
    eventually(lambda: harness.published and harness.published[-1].ending)


def test_a_row_for_an_unloaded_model_is_handed_back_at_once(harness: Harness) -> None:
    unloaded = harness.loaded()
    late = [sequence_for(claimed(f"row {i}"), unloaded.loaded.result()) for i in range(2)]
    done = threading.Event()
    unloaded.submit(late[0])
    harness.engine.unload(unloaded, done.set)
    assert done.wait(5)
    assert [output.outcome for output in harness.published if output.sequence is late[0]][-1:] == [Outcome.HANDED_BACK]
    unloaded.submit(late[1])
    assert late[1].outcome is Outcome.HANDED_BACK, "no other thread would settle it"


def test_the_phase_is_reported_when_it_changes_and_not_at_every_step() -> None:
    phases: list[tuple[str, EngineCore | None]] = []
    harness = Harness()
    harness.engine = EngineThread(on_phase=lambda *phase: phases.append(phase))

    def load() -> Generator[float, None, ModelRunner]:
        yield from (0.3, 0.6)
        return FakeRunner()

    core = harness.core(load)
    harness.engine.load(core)
    while not core.loaded.done():
        harness.engine.turn()
    submitted(core, max_tokens=10)
    for _ in range(20):
        harness.engine.turn()
    harness.engine.wake()
    harness.engine._sleep()
    assert phases == [("load", core), ("step", core), ("idle", None)]


def test_the_phase_is_reported_again_after_work_between_two_steps() -> None:
    """Such work may change the batch of another model and so the breadcrumb."""
    phases: list[tuple[str, EngineCore | None]] = []
    harness = Harness()
    harness.engine = EngineThread(on_phase=lambda *phase: phases.append(phase))
    core = harness.core()
    harness.engine.load(core)
    while not core.loaded.done():
        harness.engine.turn()
    submitted(core, max_tokens=10)
    harness.engine.turn()
    phases.clear()
    harness.engine.call_soon(lambda: None)
    harness.engine.turn()
    harness.engine.turn()
    assert phases == [("step", core)]
