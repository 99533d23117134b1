"""The engine's thread: several models take turns, load beside each other, and go."""

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
from worker.engine.core import Batch, Unloaded
from worker.engine.engine import Engine
from worker.engine.sequence import Outcome, Said, Sequence
from worker.runner.base import Backend, Fit, Media, StepResult
from worker.runner.fake import FakeBackend


class Desk:
    """An engine whose thread runs, and what its models said."""

    def __init__(self, deaths: list[str] | None = None) -> None:
        self.said: list[Said] = []
        self.engine = Engine((deaths if deaths is not None else []).append)

    def batch(self, load: Callable[[], Backend | Generator[float, None, Backend]] = FakeBackend) -> Batch:
        return Batch(load, 4, self.said.extend, self.engine.wake)

    def opened(self, load: Callable[[], Backend | Generator[float, None, Backend]] = FakeBackend) -> Batch:
        batch = self.batch(load)
        self.engine.open(batch)
        batch.loaded.result(5)
        return batch


@pytest.fixture
def desk() -> Iterator[Desk]:
    desk = Desk()
    desk.engine.start()
    yield desk
    desk.engine.close()
    desk.engine.join(5)
    assert not desk.engine.is_alive()


def submitted(batch: Batch, prompt: str = "row", **more: object) -> Sequence:
    sequence = sequence_for(claimed(prompt, **more), batch.loaded.result())  # type: ignore[arg-type]
    batch.submit(sequence)
    return sequence


def test_an_idle_engine_wakes_for_work(desk: Desk, eventually: Callable[..., None]) -> None:
    batch = desk.opened()
    steps = batch.totals.steps
    submitted(batch, max_tokens=2)
    eventually(lambda: desk.said and desk.said[-1].ending)
    assert batch.totals.steps == steps + 2
    assert time.monotonic() - batch.progress_at < 5


def test_gauges_are_read_by_the_engines_thread_alone_also_while_it_is_idle(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, eventually: Callable[..., None]
) -> None:
    readers: list[str] = []

    def stats(_: FakeBackend) -> dict[str, float]:
        readers.append(threading.current_thread().name)
        return {"readings": len(readers)}

    monkeypatch.setattr("worker.engine.core.GAUGES_S", 0.01)
    monkeypatch.setattr(FakeBackend, "stats", stats)
    batch = desk.opened()
    eventually(lambda: batch.totals.gauges.get("readings", 0) > 3)
    assert set(readers) == {"engine"}


def test_gauges_are_read_while_only_another_model_has_work(monkeypatch: pytest.MonkeyPatch) -> None:
    readings: list[FakeBackend] = []

    def stats(backend: FakeBackend) -> dict[str, float]:
        readings.append(backend)
        return {}

    monkeypatch.setattr("worker.engine.core.GAUGES_S", 0.0)
    monkeypatch.setattr(FakeBackend, "stats", stats)
    desk = Desk()
    idle, busy = desk.batch(), desk.batch()
    for batch in (idle, busy):
        desk.engine.open(batch)
    desk.engine.turn()
    submitted(busy, max_tokens=1000)
    readings.clear()
    for _ in range(5):
        desk.engine.turn()
    assert readings.count(idle.backend) >= 5, "both tell of the memory of their process"


def test_a_model_that_does_not_load_is_told_to_who_waits_and_the_others_go_on(
    desk: Desk, eventually: Callable[..., None]
) -> None:
    good = desk.opened()

    def load() -> FakeBackend:
        raise OSError("no such folder")

    def load_halfway() -> Generator[float, None, Backend]:
        yield 0.5
        raise OSError("no such file")

    for loader, told in ((load, "no such folder"), (load_halfway, "no such file")):
        bad = desk.batch(loader)
        desk.engine.open(bad)
        with pytest.raises(OSError, match=told):
            bad.loaded.result(5)
    submitted(good, max_tokens=2)
    eventually(lambda: desk.said and desk.said[-1].ending)
    assert desk.engine.batches == (good,)


def test_what_a_failed_loading_has_read_is_gone_before_that_is_told(desk: Desk) -> None:
    class Weights:
        pass

    read: list[weakref.ref[Weights]] = []

    def use(weights: Weights) -> None:
        raise OSError(f"{type(weights).__name__} are cut")

    def load() -> Generator[float, None, Backend]:
        weights = Weights()
        read.append(weakref.ref(weights))
        yield 0.5
        try:
            use(weights)
        except OSError as error:
            raise ModelError("it does not load") from error

    gone: list[bool] = []
    bad = desk.batch(load)
    bad.loaded.add_done_callback(lambda _: gone.append(read[0]() is None))
    gc.disable()  # as good as that: it is called as rarely as can be
    try:
        desk.engine.open(bad)
        error = bad.loaded.exception(5)
    finally:
        gc.enable()
    assert gone == [True], "what was there before is loaded again, and needs the memory"
    assert isinstance(error, ModelError)
    assert "use(weights)" in "".join(traceback.format_exception(error)), "where it failed is still to be told"


def test_the_engines_death_is_announced() -> None:
    deaths: list[str] = []
    desk = Desk(deaths)
    batch = Batch(FakeBackend, 1, lambda said: 1 / 0, desk.engine.wake)
    desk.engine.start()
    desk.engine.open(batch)
    batch.loaded.result(5)
    submitted(batch)
    desk.engine.join(5)
    assert deaths == ["its engine thread died (ZeroDivisionError)"]


def test_a_model_loads_piece_by_piece_while_another_speaks(desk: Desk, eventually: Callable[..., None]) -> None:
    speaker = desk.opened()
    submitted(speaker, max_tokens=100_000)
    eventually(lambda: speaker.totals.tokens > 10)
    seen: list[int] = []

    def load() -> Generator[float, None, Backend]:
        for piece in range(10):
            seen.append(speaker.totals.tokens)
            yield piece / 10
        return FakeBackend()

    loaded = desk.opened(load)
    assert loaded.load_progress == 1.0
    assert all(later > earlier for earlier, later in itertools.pairwise(seen))
    speaker.drain(0)
    eventually(lambda: not speaker.busy)


class Slow(FakeBackend):
    """Takes a while for a step, by a clock that stands still otherwise."""

    def __init__(self, clock: list[float], seconds: float) -> None:
        super().__init__()
        self.clock, self.seconds = clock, seconds

    def step(self) -> StepResult:
        self.clock[0] += self.seconds
        return super().step()


def test_models_get_the_same_time_whatever_their_steps_take(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("worker.engine.engine.time.perf_counter", lambda: clock[0])
    desk = Desk()
    quick, slow = (desk.batch(lambda seconds=seconds: Slow(clock, seconds)) for seconds in (1.0, 5.0))
    for batch in (quick, slow):
        desk.engine.open(batch)
        desk.engine.turn()
        submitted(batch, max_tokens=1000)
    steps = [(quick.totals.steps, slow.totals.steps)]
    for _ in range(120):
        desk.engine.turn()
        steps.append((quick.totals.steps, slow.totals.steps))
    assert quick.totals.steps == pytest.approx(100, abs=2)
    assert slow.totals.steps == pytest.approx(20, abs=2)
    assert max(abs(fast - 5 * tardy) for fast, tardy in steps) <= 6, "nobody waits for more than a step of the other"


def test_a_models_own_time_stands_still_while_others_step_or_load(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("worker.engine.engine.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr("worker.engine.core.time.monotonic", lambda: clock[0])
    desk = Desk()
    quick, slow = (desk.batch(lambda seconds=seconds: Slow(clock, seconds)) for seconds in (1.0, 5.0))
    for batch in (quick, slow):
        desk.engine.open(batch)
        desk.engine.turn()
        submitted(batch, max_tokens=1000)
    steps = quick.totals.steps, slow.totals.steps
    before = quick.own_time(), slow.own_time()
    for _ in range(120):
        desk.engine.turn()
    assert quick.own_time() - before[0] == (quick.totals.steps - steps[0]) * 1.0
    assert slow.own_time() - before[1] == (slow.totals.steps - steps[1]) * 5.0

    def load() -> Generator[float, None, Backend]:
        for _ in range(3):
            clock[0] += 100.0
            yield 0.5
        return FakeBackend()

    before = quick.own_time(), slow.own_time()
    desk.engine.open(desk.batch(load))
    for _ in range(4):
        desk.engine.turn()
    assert quick.own_time() - before[0] < 100.0
    assert slow.own_time() - before[1] < 100.0


def test_idling_earns_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("worker.engine.engine.time.perf_counter", lambda: clock[0])
    desk = Desk()
    first, second = (desk.batch(lambda: Slow(clock, 1.0)) for _ in range(2))
    for batch in (first, second):
        desk.engine.open(batch)
        desk.engine.turn()
    submitted(first, max_tokens=1000)
    for _ in range(100):
        desk.engine.turn()
    before = first.totals.steps
    submitted(second, max_tokens=1000)
    for _ in range(20):
        desk.engine.turn()
    assert first.totals.steps - before == pytest.approx(10, abs=1)


def test_a_model_that_comes_later_has_not_saved_up_the_time_before(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("worker.engine.engine.time.perf_counter", lambda: clock[0])
    desk = Desk()
    first, late = (desk.batch(lambda: Slow(clock, 1.0)) for _ in range(2))
    desk.engine.open(first)
    desk.engine.turn()
    submitted(first, max_tokens=100)
    for _ in range(110):
        desk.engine.turn()
    assert first.idle
    desk.engine.open(late)
    desk.engine.turn()
    for batch in (late, first):
        submitted(batch, max_tokens=1000)
    before = first.totals.steps
    for _ in range(20):
        desk.engine.turn()
    assert first.totals.steps - before == pytest.approx(10, abs=1)


def test_rows_that_wait_for_memory_take_no_time_from_other_models(monkeypatch: pytest.MonkeyPatch) -> None:
    class Starved(FakeBackend):
        granted = 0

        def fits(self, tokens: int, media: Media | None = None) -> Fit:
            return Fit.NOW if tokens <= self.granted else Fit.LATER

        def grant(self, most_bytes: int, hoped_bytes: int = 0) -> None:
            self.granted = most_bytes

    monkeypatch.setattr("worker.engine.engine.time.perf_counter", itertools.count().__next__)
    desk = Desk()
    starved, other = desk.batch(Starved), desk.batch()
    for batch in (starved, other):
        desk.engine.open(batch)
    desk.engine.turn()
    waits = submitted(starved, max_tokens=2)
    submitted(other, max_tokens=1000)
    for _ in range(20):
        desk.engine.turn()
    assert (starved.busy, starved.idle) == (True, True)
    assert other.totals.steps >= 19
    desk.engine.do(lambda: starved.grant(100))
    for _ in range(60):
        desk.engine.turn()
    assert waits.ending and waits.ending.status is Status.SUCCEEDED
    assert starved.idle


def test_a_model_that_is_shut_is_gone_and_the_others_go_on(desk: Desk, eventually: Callable[..., None]) -> None:
    stays, goes = desk.opened(), desk.opened()
    done = threading.Event()
    desk.engine.shut(goes, done.set)
    assert done.wait(5)
    assert desk.engine.batches == (stays,)
    assert isinstance(goes.loaded.exception(), Unloaded)
    submitted(stays, max_tokens=2)
    eventually(lambda: desk.said and desk.said[-1].ending)


def test_what_comes_to_a_model_that_is_gone_is_handed_back_at_once(desk: Desk) -> None:
    goes = desk.opened()
    late = [sequence_for(claimed(f"row {i}"), goes.loaded.result()) for i in range(2)]
    done = threading.Event()
    goes.submit(late[0])
    desk.engine.shut(goes, done.set)
    assert done.wait(5)
    assert [said.outcome for said in desk.said if said.sequence is late[0]][-1:] == [Outcome.HANDED_BACK]
    goes.submit(late[1])
    assert late[1].outcome is Outcome.HANDED_BACK, "nobody else would tell the thread that waits for it"
