"""The models of a worker process: opening and closing them, and dividing the memory among them."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Generator, Iterable, Iterator
from functools import partial
from typing import Final

from shared.blas import Blas
from shared.models.catalog import Catalog, CatalogModel
from shared.models.registry import MIN_CACHE_SHARE
from shared.settings import Settings
from worker.engine.core import EngineCore
from worker.engine.engine import Phase
from worker.models.load import first_line, never_exits
from worker.process.breadcrumb import Breadcrumb
from worker.runner import choose_loader, memory_in_use, memory_limit
from worker.runner.base import ModelRunner
from worker.service.model_worker import ModelWorker, WorkerProcess, with_catalog_values

logger = logging.getLogger(__name__)

LAST_WRITES_S: Final = 3.0
"""Time after `DRAIN_S` for the last writes and for handing jobs back."""


class ModelPool:
    """The models of this process; implements `worker.service.switching.Models`.

    Args:
        breadcrumb: records the models, and which of them the engine works on.

    Attributes:
        memory_limit: bytes that models and caches may take together; 0 before the first model is loaded.
        serving: whether jobs are claimed. Until then loaded models wait.
        warm: ids of the models that stay loaded although nothing uses them: those that the process loads when
            it starts. Pinned models stay too.
    """

    def __init__(self, settings: Settings, catalog: Catalog, process: WorkerProcess, breadcrumb: Breadcrumb) -> None:
        self.catalog = catalog
        self.memory_limit = 0
        self.serving = False
        self.warm = frozenset[str]()
        self._settings = settings
        self._process = process
        self._breadcrumb = breadcrumb
        self._workers: dict[str, ModelWorker] = {}
        self._blas: Blas | None = None
        self._gflops = 0.0

    @property
    def workers(self) -> tuple[ModelWorker, ...]:
        """The model workers of this process, loading ones included."""
        return tuple(self._workers.values())

    def load_all(self, models: Iterable[CatalogModel]) -> Iterator[str]:
        """Load models as far as there is memory; yield the reason for each one that was not loaded."""
        for model in models:
            self.warm |= {model.id}
            if self._workers and not self.fits(model, self.workers):
                yield f"{model.path} is not loaded: the other models leave too little memory (MEMORY_LIMIT_BYTES)"
                continue
            worker = self.open(model)
            error = worker.core.loaded.exception()
            if error is None:
                self.serve(worker)
                continue
            logger.debug("loading_failed", exc_info=error)
            del self._workers[model.id]
            worker.close()
            yield f"{model.path} does not load: {first_line(error)}"

    def start_serving(self) -> None:
        """Claim jobs for all models from now on. The broker may be unreachable: only wake-ups come through it."""
        self.serving = True
        for worker in self.workers:
            worker.start_claiming()

    def wake(self, model: str) -> None:
        """Look for jobs of a model, if this process has it."""
        worker = self._workers.get(model)
        if worker is not None:
            worker.wake()

    def open(self, model: CatalogModel, *, pinned: bool = False) -> ModelWorker:
        """Begin to load a model."""
        worker = ModelWorker(self._process, model, partial(self._load, model), pinned=pinned)
        self._workers[model.id] = worker
        self._breadcrumb.workers({each.id: each.model.id for each in self.workers})
        worker.open()
        return worker

    def serve(self, worker: ModelWorker) -> None:
        """Claim jobs for a model that is loaded, as soon as this process serves."""
        runner = worker.runner
        if runner is not None:
            logger.info("model_loaded", extra={"model": runner.card.id, "about": runner.about})
        worker.on_loaded()
        self.divide_memory()
        if self.serving:
            worker.start_claiming()

    def close(self, worker: ModelWorker) -> None:
        """Drain and unload a model; return when that is done."""
        worker.drain(self._settings.drain_s)
        worker.wait_idle(self._settings.drain_s + LAST_WRITES_S)
        worker.unload()
        self._workers = {name: each for name, each in self._workers.items() if each is not worker}
        self.divide_memory()

    def unused(self) -> list[ModelWorker]:
        """Return the models that have had no job for MODEL_IDLE_S and need not stay loaded."""
        limit_s = self._settings.model_idle_s
        if not limit_s or not self._settings.load_on_demand:
            return []
        kept = (each for each in self.workers if not each.pinned and each.model.id not in self.warm)
        return [each for each in kept if each.unused_s > limit_s]

    def fits(self, model: CatalogModel, others: Iterable[ModelWorker]) -> bool:
        """Return whether a model fits in addition to others, with some memory left for their jobs."""
        weights_bytes = model.measure() + sum(worker.weights_bytes for worker in others)
        return weights_bytes <= (1 - MIN_CACHE_SHARE) * self.memory_limit

    def free_memory(self, needed_bytes: int) -> bool:
        """Shrink the caches of the loaded models; return whether `needed_bytes` became free within DRAIN_S."""
        self.divide_memory(needed_bytes)
        until = time.monotonic() + self._settings.drain_s
        while self.memory_used() + needed_bytes > self.memory_limit and time.monotonic() < until:
            time.sleep(0.05)
        return self.memory_used() + needed_bytes <= self.memory_limit

    def divide_memory(self, needed_bytes: int = 0) -> None:
        """Divide the memory that the models leave equally among their caches.

        Args:
            needed_bytes: memory to keep free for a model that is about to be loaded.
        """
        self._process.engine.call_soon(lambda: self._divide_now(needed_bytes))

    def memory_used(self) -> int:
        """Bytes in use by the model library."""
        return memory_in_use()

    def on_phase(self, phase: Phase, core: EngineCore | None) -> None:
        """Record what the engine thread does next."""
        worker = next((each for each in self.workers if each.core is core), None)
        if phase == "load" and worker is not None:
            self._breadcrumb.loading(worker.model.id)
        elif phase == "step" and worker is not None:
            self._breadcrumb.resume(worker.id)
        else:
            self._breadcrumb.idle()

    def _load(self, model: CatalogModel) -> Generator[float, None, ModelRunner]:
        """Load a model, on the engine thread."""
        self._prepare_library()
        loaded = yield from never_exits(choose_loader(self._settings, model), model.path)
        runner = with_catalog_values(loaded, model)
        if self._blas is not None:
            runner.about |= {"blas": self._blas.version or self._blas.name, "gflops": round(self._gflops, 1)}
            if self._blas.reason:
                runner.about["blas_note"] = self._blas.reason
        return runner

    def _prepare_library(self) -> None:
        """Prepare the model library once, before MLX is first imported."""
        if self.memory_limit:
            return
        if not self._settings.modelless:
            self._prepare_blas()
        self.memory_limit = memory_limit(self._settings)

    def _prepare_blas(self) -> None:
        from shared.blas import prefer_openblas

        if self._settings.workers > 1:  # each takes its share of the cores, unless the environment has another number
            share = max(1, (os.cpu_count() or 1) // self._settings.workers)
            os.environ.setdefault("OPENBLAS_NUM_THREADS", str(share))
        self._blas = prefer_openblas()
        from worker.models.load import measure_gflops

        self._gflops = measure_gflops()

    def _divide_now(self, needed_bytes: int) -> None:
        if len(self.catalog.models) <= 1:
            return
        cores = self._process.engine.cores
        free_bytes = self.memory_limit - sum(core.runner.weights_bytes for core in cores)
        for core in cores:
            share = max(0, free_bytes) // len(cores)
            # The model may not load, or not stay. So a job that fits into the present share waits instead of failing.
            share_with_model = max(0, free_bytes - needed_bytes) // (len(cores) + 1)
            core.set_cache_limit(share_with_model if needed_bytes else share, share)
