"""From a request to a job in the queue.

The record is written before the wake-up is sent: a job that was accepted is never lost, at worst it starts a second
later.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import redis
from redis.exceptions import OutOfMemoryError

from shared.errors import Conflict, Invalid, KeyQueueFull, NotDurable, Unavailable
from shared.jobs.images import ImageStore
from shared.jobs.record import Job, Priority
from shared.jobs.request import Request, Sampling
from shared.jobs.store import Accepted, Jobs, Submission, new_job_id
from shared.models.catalog import Catalog, SamplingDefaults
from shared.models.registry import ModelCard
from shared.queue.wakeups import Notifier
from shared.settings import Settings
from web.admission.prefix_hashes import prefix_hashes
from web.admission.prompt_tokenizer import PromptTokenizer
from web.cluster.snapshot import Cluster
from web.schemas.requests import JobRequest

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
        cluster: Cluster,
        prompts: PromptTokenizer,
        notifier: Notifier,
        demand: Callable[[str], object] = lambda _: None,
        check_demand: Callable[[str], object] = lambda _: None,
    ) -> None:
        self._settings = settings
        self._catalog = catalog
        self._demand = demand
        self._check_demand = check_demand
        self._jobs = jobs
        self._images = images
        self._cluster = cluster
        self._prompts = prompts
        self._notifier = notifier

    def admit(
        self, request: JobRequest, origin: Origin, files: Mapping[str, bytes] | None = None, unread: int = 0
    ) -> Accepted:
        """Accept a request as a job.

        Args:
            files: the images that its messages name, by digest.
            unread: how many more it has, which are not here: it is repeated, and no new job is made of it.

        Raises:
            Invalid: it cannot be run as it is; nothing was enqueued.
            Conflict: no worker has the model, and it is not loaded on demand.
            Unavailable: the queue is full, or the model does not load.
            redis.RedisError: Redis is away.
        """
        image_bytes = sum(map(len, (files or {}).values()))
        submission = replace(
            self.submission(request, origin), images=len(files or ()) + unread, image_bytes=image_bytes
        )
        job_id = new_job_id()
        if files:
            # Before the job that names them: what proves the job to be on the disk proves all that was written before.
            self._images.put(job_id, files)
        try:
            accepted = self._jobs.create(submission, job_id)
        except (Invalid, KeyQueueFull, Unavailable, OutOfMemoryError) as refused:
            if files and not isinstance(refused, NotDurable):  # then it may have been accepted
                self._images.drop(job_id)
            raise
        if files and not accepted.new:
            self._images.drop(job_id)
        if accepted.wake:
            self._notifier.wake([accepted.job.model])
        if accepted.new:
            self._ask_for_model(accepted.job)
        return accepted

    def submission(self, request: JobRequest, origin: Origin) -> Submission:
        """The request as the queue takes it, with every default filled in.

        Raises:
            Invalid: it cannot be run as it is.
        """
        model, card = self._resolve(request.model)
        self._check_cold(model, origin)
        wanted = self._request_for(request, model, card)
        entry = self._catalog.models.get(model)
        kind = card.kind if card else entry.told_kind if entry else None
        if kind == "text" and wanted.image_parts:
            raise Invalid(f"{model} is a text model: it takes no images.", code="no_images", field="model")
        tokenized = None if card is None else self._prompts.tokenize(card, wanted, request.prompt_field)
        return Submission(
            request=wanted,
            owner=origin.owner,
            priority=Priority[request.priority.upper()],
            metadata=request.metadata,
            request_id=origin.request_id,
            idempotency_key=origin.idempotency_key,
            fingerprint=origin.fingerprint,
            start_within_s=_at_most("start_within_s", request.start_within_s, self._settings.max_start_within_s),
            deadline_s=_at_most("deadline_s", request.deadline_s, self._settings.max_deadline_s),
            prefixes=prefix_hashes(wanted, origin.owner) if self._settings.prefix_cache_bytes else (),
            tokens=tokenized.tokens if tokenized else None,
            shared=tokenized.shared if tokenized else 0,
        )

    def _resolve(self, asked: str | None) -> tuple[str, ModelCard | None]:
        """A model's id and card; the default model has none before its first worker has come up."""
        entry = self._catalog.resolve(asked)
        model = entry.id if entry else asked or self._catalog.default
        card = self._cluster.now().models.get(model)
        if card is None and entry is None:
            raise Invalid("There is no such model.", code="model_not_found", field="model")
        return model, card

    def _check_cold(self, model: str, origin: Origin) -> None:
        """Refuse a new job for a model that no worker has, where it is not loaded for it."""
        if self._cluster.now().has(model) or self._jobs.known(origin.owner, origin.idempotency_key):
            return
        if self._settings.load_on_demand:
            self._check_demand(model)
            return
        snapshot = self._cluster.now(max_age_s=0)
        # The default model's first worker may be about to come up, or to come back.
        if not snapshot.has(model) and (snapshot.hosts or model != self._catalog.default):
            raise Conflict("No worker has this model loaded.", code="model_not_loaded", field="model")

    def _request_for(self, request: JobRequest, model: str, card: ModelCard | None) -> Request:
        entry = self._catalog.models.get(model)
        most = card.context if card else entry.most_tokens if entry else None
        default = entry.sampling if entry else SamplingDefaults()

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
            sampling=Sampling(
                temperature=self._settings.temperature if temperature is None else temperature,
                top_p=value("top_p"),
                top_k=value("top_k"),
                min_p=value("min_p"),
                repetition_penalty=value("repetition_penalty"),
                presence_penalty=value("presence_penalty"),
                frequency_penalty=value("frequency_penalty"),
                # Chosen now and stored, so that another attempt continues as the first would have.
                seed=secrets.randbits(63) if request.seed is None else request.seed,
            ),
            prompt=None if messages else request.prompt,
            messages=messages,
            stop=tuple(request.stop),
            parse=request.parse,
            share_system_prompt=request.share_system_prompt,
            logprobs=request.logprobs,
        )

    def _ask_for_model(self, job: Job) -> None:
        """Request the model of an accepted job if no worker has it; if that fails now, maintenance tries again."""
        try:
            if not self._cluster.now().has(job.model):
                self._demand(job.model)
        except redis.RedisError as error:
            log.warning("model_not_demanded", extra={"model": job.model, "job_id": job.id, "reason": str(error)})


def _at_most(field: str, asked: float | None, most: float) -> float | None:
    if asked is not None and asked > most:
        raise Invalid(f"{field} can be at most {most:.15g} seconds.", field=field)
    return asked
