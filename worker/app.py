"""The worker process: `python -m worker.app`; `worker.app:app` is the Celery app for Celery's own commands.

It starts in the order lease, publisher, engine (which loads and warms the model), Celery: nothing is consumed before
it can be worked on. It stops the other way round: Celery stops consuming, the engine gives running jobs `DRAIN_S`,
the publisher writes what they said, what is left goes back to the queue, the lease is given up.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import time
from collections.abc import Hashable
from functools import partial
from types import FrameType
from typing import Final, NoReturn

from kombu.exceptions import OperationalError
from redis import RedisError

from shared.claims import Claims, Reaper
from shared.garbage import settle
from shared.images import ImageStore
from shared.log import JobLog
from shared.logging import configure
from shared.registry import Registry, WorkerInfo
from shared.settings import Settings, load_settings
from shared.store import connect
from shared.tickets import TicketOffice, app, make_app
from worker.backends import choose_loader
from worker.backends.base import Backend
from worker.consumer import Consumer, node_name, stop_consuming
from worker.engine import Engine
from worker.lease import Claim, Housekeeper, LeaseKeeper
from worker.publisher import Publisher
from worker.tasks import Runner, register
from worker.vital import EXIT_BROKEN, depart, end_process, leave
from worker.watchdog import Sign, Signs, Watchdog

logger = logging.getLogger("worker.app")

EXIT_CONFIG: Final = 78
"""Exit status when the model does not load (EX_CONFIG): starting again would not help."""

LAST_WRITES_S: Final = 3.0
"""Beyond `DRAIN_S`, the time to write what was said, hand back and end; then the process is ended."""
PUBLISHER_S: Final = 60.0
"""A write may take so long: while Redis is out of reach, several connections are tried."""


class Service:
    """The parts of a worker process, and the order in which they start and stop."""

    def __init__(self, settings: Settings, index: int) -> None:
        self._settings = settings
        self._started_at = time.time()
        self._state = "loading"
        self._model_announced = False
        self._tokenizer: str | None = None
        self._ending = False
        # A restarted worker is another worker: the old one's lease lapses, and that counts the loss.
        self._id = f"{socket.gethostname()}-{index}-{secrets.token_hex(4)}"
        self._node = node_name(settings, index)
        self._error_file = settings.run_dir / f"worker-{index}.error"

        client = connect(settings.store_url)
        self._claims = Claims(client, self._id)
        self._tickets = TicketOffice(make_app(settings, hasty=True), client, Registry(client))
        self._held: set[Claim] = set()
        self._publisher = Publisher(self._claims, lambda *word: self._engine.heed(*word), self._die)  # noqa: PLW0108
        self._engine = Engine(self._load, settings.slots, self._publisher.put, self._die)
        self._watchdog = Watchdog(self._under_way, self._on_stuck, self._on_late, self._die)
        # The lease keeper's calls must not take longer than the lease holds, tried twice and with the pause between.
        quick_client = connect(settings.store_url, timeout_s=settings.lease_s / 3, retries=1)
        self._quick_claims = Claims(quick_client, self._id)
        self._registry = Registry(quick_client)
        self._keeper = LeaseKeeper(
            self._quick_claims,
            self._engine.heed,
            self._held,
            self._announce,
            settings.lease_s,
            settings.max_attempts,
            lambda: self._watchdog.tripped or self._ending,
            self._die,
        )
        self._runner = Runner(
            self._engine,
            self._publisher,
            self._claims,
            JobLog(client),
            self._tickets,
            self._held,
            self._keeper.wait_renewal,
            ImageStore(connect(settings.store_url, decode_responses=False)).get,
        )
        self._housekeeper = Housekeeper(Reaper(client, settings.max_attempts), self._tickets, self._die)

    def run(self) -> int:
        """Work until a signal ends it; the exit status."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        self._keeper.start()
        self._publisher.start()
        self._engine.start()
        self._watchdog.start()
        try:
            backend = self._engine.loaded.result()
        except Exception as error:  # noqa: BLE001 - a model library may raise anything
            return self._load_failed(error)
        settle()
        self._error_file.unlink(missing_ok=True)
        logger.info("model loaded", extra={"model": backend.card.id, "about": backend.about})
        self._housekeeper.start()
        register(app, self._runner)
        consumer = Consumer(app, self._settings, self._node, self._on_ready)
        consumer.start()
        self._wind_up()
        return consumer.status

    def _load(self) -> Backend:
        """Load the model, on the engine's thread."""
        if self._settings.backend == "fake":
            return choose_loader(self._settings)()
        from shared.blas import prefer_openblas

        if self._settings.workers > 1:  # each takes its share of the cores, unless somebody has said otherwise
            share = max(1, (os.cpu_count() or 1) // self._settings.workers)
            os.environ.setdefault("OPENBLAS_NUM_THREADS", str(share))
        blas = prefer_openblas()  # before anything imports MLX
        backend = choose_loader(self._settings)()
        if backend.card.tokenizer:  # read here, for the lease's thread must wait for no disk
            self._tokenizer = (self._settings.model_path / "tokenizer.json").read_text(encoding="utf-8")
        from worker.blas_speed import measure_gflops

        backend.about |= {"blas": blas.version or blas.name, "gflops": round(measure_gflops(), 1)}
        if blas.reason:
            backend.about["blas_note"] = blas.reason
        return backend

    def _load_failed(self, error: Exception) -> int:
        """Say why, to the log and to whoever started us."""
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = f"{self._settings.model_path} does not load: {lines[0]}"
        logger.error(reason)
        logger.debug("where it failed", exc_info=error)
        try:
            self._error_file.parent.mkdir(parents=True, exist_ok=True)
            self._error_file.write_text(reason + "\n")
        except OSError as unwritable:
            logger.warning("it is not written to %s: %s", self._error_file, unwritable)
        self._keeper.stop()
        return EXIT_CONFIG

    def _on_ready(self) -> None:
        if not self._runner.draining:
            self._state = "ready"
            self._keeper.hurry()

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        """End: the first signal drains, a further one hands back at once."""
        first = not self._runner.draining
        self._runner.draining = True
        self._state = "draining"
        if not self._engine.loaded.done():
            os._exit(os.EX_OK)  # no job is held yet, and the engine is deep inside the model library
        seconds = self._settings.drain_s if first else 0.0
        self._engine.drain(seconds)
        self._watchdog.end_within(seconds + LAST_WRITES_S)
        stop_consuming()

    def _wind_up(self) -> None:
        """End the threads. Celery's have ended, so every job is settled."""
        self._housekeeper.stop()
        self._engine.close()
        self._engine.join()
        self._publisher.close()
        self._publisher.join()
        self._keeper.stop()
        self._give_up()
        logger.info("the worker has ended")

    def _under_way(self) -> Signs:
        patience_s = self._settings.watchdog_s
        encoding = self._runner.encoding
        signs: dict[Hashable, Sign] = {encoding[0]: Sign(0, patience_s)} if encoding else {}
        if self._engine.loaded.done() and not self._engine.idle:
            signs["engine"] = Sign(self._engine.progress_at, patience_s)
        if self._publisher.backlog:
            signs["publisher"] = Sign(self._publisher.attempts, max(patience_s, PUBLISHER_S))
        return signs

    def _on_stuck(self, stuck: list[Hashable]) -> None:
        """End. A prompt that cannot be read fails its job, and no other is to blame; else, nobody knows."""
        encoding = self._runner.encoding
        culprits = [encoding[1]] if encoding and encoding[0] in stuck else []  # or read at last, this very moment
        unread = any(isinstance(key, tuple) for key in stuck)
        what = ", ".join(sorted("reading of a prompt" if isinstance(key, tuple) else str(key) for key in stuck))
        self._ending = True
        self._runner.draining = True
        end_process(
            f"its {what} has not got on for too long",
            *(partial(self._runner.fail, job) for job in culprits),
            partial(self._give_up, None if unread else self._settings.max_attempts),
        )

    def _on_late(self) -> None:
        """End a drain that takes too long, as in the middle of a long step: what is left goes on elsewhere."""
        self._ending = True
        late = partial(logger.warning, "the drain's time is over: what still runs is left to others")
        depart(os.EX_OK, late, self._give_up)

    def _die(self, reason: str) -> NoReturn:
        """End because a thread has died."""
        self._ending = True
        self._runner.draining = True
        end_process(reason, partial(self._give_up, self._settings.max_attempts))

    def _give_up(self, max_attempts: int | None = None) -> None:
        """Let others have what we hold at once, instead of when the lease lapses."""
        try:
            self._tickets.send_all(self._quick_claims.retire(max_attempts=max_attempts))
        except (RedisError, OperationalError) as error:
            logger.warning("the lease is left to lapse: %s", error)

    def _announce(self, unknown: bool) -> None:
        """Tell who we are; and which model we have, when Redis does not know."""
        self._registry.announce_worker(self._describe(), 3 * self._settings.lease_s)
        backend = self._backend()
        if backend is not None and (unknown or not self._model_announced):
            self._registry.announce_model(backend.card, self._tokenizer)
            self._model_announced = True

    def _backend(self) -> Backend | None:
        loaded = self._engine.loaded
        return loaded.result() if loaded.done() and loaded.exception() is None else None

    def _describe(self) -> WorkerInfo:
        backend, engine = self._backend(), self._engine
        totals = engine.totals
        stats = {
            "steps": totals.steps,
            "generated_tokens": totals.tokens,
            "prompt_tokens": totals.prompt_tokens,
            "batch_size": totals.last_batch,
            "row_cap": engine.row_cap,
            "publisher_backlog": self._publisher.backlog,
            "engine_idle_s": time.monotonic() - engine.progress_at if engine.busy else 0.0,
        }
        return WorkerInfo(
            id=self._id,
            node=self._node,
            host=socket.gethostname(),
            pid=os.getpid(),
            model=self._settings.model_id,
            state=self._state,
            slots=self._settings.slots,
            slots_used=len(self._held),
            started_at=self._started_at,
            heartbeat_at=time.time(),
            stats=stats | totals.gauges,
            about=dict(backend.about) if backend else {},
        )


def main() -> int:
    """Run one worker; the exit status."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a model is what its folder holds; nothing is fetched while it loads
    settings, index = load_settings(), int(os.environ.get("MLXQ_WORKER_INDEX", "0"))
    configure(f"worker-{index}", settings.log_level)
    try:
        return Service(settings, index).run()
    except BaseException:
        # Raised further it would end the interpreter, which MLX's threads do not survive in peace: they abort.
        logger.critical("the worker ends itself", exc_info=True)
        return EXIT_BROKEN


if __name__ == "__main__":
    leave(main())
