"""From a request to a job in line.

The record is written before the ticket is sent: a job that was accepted is never lost, at worst it starts a second
later.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import redis
from kombu.exceptions import OperationalError
from redis.exceptions import OutOfMemoryError

from shared.errors import Conflict, Invalid, KeyReused, NotDurable, Unavailable
from shared.jobs import request as asked
from shared.jobs.images import ImageStore
from shared.jobs.record import Job, Priority
from shared.jobs.request import Request
from shared.jobs.store import Jobs, Submission, new_job_id
from shared.models.catalog import Catalog, Sampling
from shared.models.registry import ModelCard
from shared.queue.wakeups import TicketOffice
from shared.settings import Settings
from web.admission_tokens import PromptSizer
from web.cluster import Roster
from web.marks import marks
from web.schemas import JobRequest

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a request comes from.

    Attributes:
        owner: id of the API key.
        idempotency_key: as the caller chose it; empty for none.
        fingerprint: hash of what the request means; empty without a key.
    """

    owner: str
    request_id: str = ""
    idempotency_key: str = ""
    fingerprint: str = ""


class Admission:
    """Checks requests and accepts jobs."""

    def __init__(
        self,
        settings: Settings,
        catalog: Catalog,
        jobs: Jobs,
        images: ImageStore,
        roster: Roster,
        sizer: PromptSizer,
        tickets: TicketOffice,
        demand: Callable[[str], object] = lambda _: None,
        check_demand: Callable[[str], object] = lambda _: None,
    ) -> None:
        self._settings = settings
        self._catalog = catalog
        self._demand = demand
        self._check_demand = check_demand
        self._jobs = jobs
        self._images = images
        self._roster = roster
        self._sizer = sizer
        self._tickets = tickets

    def admit(
        self, request: JobRequest, origin: Origin, files: Mapping[str, bytes] | None = None, unread: int = 0
    ) -> tuple[Job, bool]:
        """Accept a request as a job.

        Args:
            files: the images that its messages name, by digest.
            unread: how many more it has, which are not here: it is repeated, and no new job is made of it.

        Returns:
            The job, and whether it is new (not the answer to a repeated Idempotency-Key).

        Raises:
            Invalid: it cannot be run as it is; nothing was enqueued.
            Conflict: no worker has the model, and none is to load it.
            Unavailable: the queue is full, or the model does not load.
            redis.RedisError: Redis is away.
        """
        submission = replace(self.submission(request, origin), images=len(files or ()) + unread)
        job_id = new_job_id()
        if files:
            # Before the job that names them: what proves the job to be on the disk proves all that was written before.
            self._images.put(job_id, files)
        try:
            job, new = self._jobs.create(submission, job_id)
        except (KeyReused, Unavailable, OutOfMemoryError) as refused:
            if files and not isinstance(refused, NotDurable):  # of that, nobody knows whether it was accepted
                self._images.drop(job_id)
            raise
        if files and not new:
            self._images.drop(job_id)
        if new:
            self._send_ticket(job)
            self._ask_for_model(job)
        return job, new

    def submission(self, request: JobRequest, origin: Origin) -> Submission:
        """The request as the queue takes it, with every default filled in.

        Raises:
            Invalid: it cannot be run as it is.
        """
        model, card = self._resolve(request.model)
        self._check_cold(model, origin)
        generation = self._generation(request, model, card)
        entry = self._catalog.models.get(model)
        kind = card.kind if card else entry.told_kind if entry else None
        if kind == "text" and generation.image_parts:
            raise Invalid(f"{model} is a text model: it takes no images.", code="no_images", field="model")
        if card is not None:
            self._sizer.check(card, generation, request.prompt_field)
        return Submission(
            generation=generation,
            owner=origin.owner,
            priority=Priority[request.priority.upper()],
            metadata=request.metadata,
            request_id=origin.request_id,
            idempotency_key=origin.idempotency_key,
            fingerprint=origin.fingerprint,
            start_within_s=_at_most("start_within_s", request.start_within_s, self._settings.max_start_within_s),
            deadline_s=_at_most("deadline_s", request.deadline_s, self._settings.max_deadline_s),
            marks=marks(generation, origin.owner) if self._settings.prefix_cache_bytes else (),
        )

    def _resolve(self, asked: str | None) -> tuple[str, ModelCard | None]:
        """A model's id and card; the default model has none before its first worker has come up."""
        entry = self._catalog.resolve(asked)
        model = entry.id if entry else asked or self._catalog.default
        card = self._roster.now().models.get(model)
        if card is None and entry is None:
            raise Invalid("There is no such model.", code="model_not_found", field="model")
        return model, card

    def _check_cold(self, model: str, origin: Origin) -> None:
        """Refuse a new job for a model that no worker has, where it is not loaded for it."""
        if self._roster.now().has(model) or self._jobs.known(origin.owner, origin.idempotency_key):
            return
        if self._settings.load_on_demand:
            self._check_demand(model)
            return
        snapshot = self._roster.now(max_age_s=0)
        # The default model's first worker may be about to come up, or to come back.
        if not snapshot.has(model) and (snapshot.hosts or model != self._catalog.default):
            raise Conflict("No worker has this model loaded.", code="model_not_loaded", field="model")

    def _generation(self, request: JobRequest, model: str, card: ModelCard | None) -> Request:
        entry = self._catalog.models.get(model)
        most = card.context if card else entry.most_tokens if entry else None
        default = entry.sampling if entry else Sampling()

        def value(name: str) -> Any:
            """What the request says; else the model's default, else the API's."""
            said, given = getattr(request, name), getattr(default, name)
            return given if said is None or (given is not None and name not in request.model_fields_set) else said

        if request.max_tokens is not None and most is not None and request.max_tokens > most:
            raise Invalid(f"The model's context is {most} tokens.", field="max_tokens")
        # Before its first worker has come up, a model is taken for one that knows conversations: most do.
        messages = request.conversation(has_template=card is None or card.chat_template is not None)
        temperature, usual = value("temperature"), default.max_tokens or self._settings.max_tokens
        return Request(
            model=model,
            max_tokens=request.max_tokens or min(usual, most or usual),
            sampling=asked.Sampling(
                temperature=self._settings.temperature if temperature is None else temperature,
                top_p=value("top_p"),
                top_k=value("top_k"),
                min_p=value("min_p"),
                repetition_penalty=value("repetition_penalty"),
                presence_penalty=value("presence_penalty"),
                frequency_penalty=value("frequency_penalty"),
                # Chosen now and kept, so that another attempt goes on as the first would have.
                seed=secrets.randbits(63) if request.seed is None else request.seed,
            ),
            prompt=None if messages else request.prompt,
            messages=messages,
            stop=tuple(request.stop),
            parse=request.parse,
            share_system_prompt=request.share_system_prompt,
        )

    def _send_ticket(self, job: Job) -> None:
        try:
            self._tickets.send(job.model, job.id)
        except (OperationalError, redis.RedisError, OSError) as error:
            log.warning("No ticket for %s yet, upkeep will send one: %s", job.id, error, extra={"job_id": job.id})

    def _ask_for_model(self, job: Job) -> None:
        """Have the model of an accepted job loaded where nobody has it; what cannot be asked now, upkeep asks again."""
        try:
            if not self._roster.now().has(job.model):
                self._demand(job.model)
        except redis.RedisError as error:
            log.warning("%s is not asked for yet: %s", job.model, error, extra={"job_id": job.id})


def _at_most(field: str, asked: float | None, most: float) -> float | None:
    if asked is not None and asked > most:
        raise Invalid(f"{field} can be at most {most:.15g} seconds.", field=field)
    return asked
