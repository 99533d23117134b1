"""The loading of one model, in pieces, on the engine thread."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from traceback import clear_frames

from worker.runner import release
from worker.runner.base import ModelRunner, RunnerLoader


class Unloaded(Exception):
    """The model has been unloaded."""


class Loading:
    """Loads a runner and holds the result.

    Args:
        load: returns the runner; or a generator that loads it in pieces and yields the progress.

    Attributes:
        result: the warm runner, or the exception that was raised; `Unloaded` after the end.
        progress: 0 to 1.
    """

    def __init__(self, load: RunnerLoader) -> None:
        self.result: Future[ModelRunner] = Future()
        self.progress = 0.0
        self._load = load

    def pieces(self, on_piece: Callable[[], object], on_loaded: Callable[[ModelRunner], object]) -> Iterator[None]:
        """Load a piece per iteration. `on_loaded` is called before the result is set."""
        try:
            runner = yield from self._pieces(on_piece)
            on_loaded(runner)
        except Exception as error:  # noqa: BLE001 - a model library may raise anything
            _free_frames(error)
            self.result.set_exception(error)
            return
        self.progress = 1.0
        self.result.set_result(runner)

    def unload(self) -> None:
        """Drop the runner."""
        self.result = Future()
        self.result.set_exception(Unloaded())

    def _pieces(self, on_piece: Callable[[], object]) -> Generator[None, None, ModelRunner]:
        loaded = self._load()
        if not isinstance(loaded, Generator):
            return loaded
        while True:
            try:
                self.progress = next(loaded)
            except StopIteration as end:
                runner: ModelRunner = end.value
                return runner
            on_piece()
            yield


def _free_frames(error: Exception) -> None:
    """Free the memory of a failed loading: the exception is kept, and its traceback refers to all local variables."""
    each: BaseException | None = error
    while each is not None:
        clear_frames(each.__traceback__)
        each = each.__cause__ or each.__context__
    release()
