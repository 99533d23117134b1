"""Turn a request into a job in the queue.

The job is stored before its worker is woken. If the wake-up is lost, the job starts up to a second later.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeAlias, get_args

import redis
from redis.exceptions import OutOfMemoryError

from shared.errors import Conflict, Forbidden, Invalid, NotDurable, RateLimited, Unavailable
from shared.jobs.images import ImageStore
from shared.jobs.limits import STANDARD, OwnerLimits
from shared.jobs.record import Job, Priority
from shared.jobs.request import Request
from shared.jobs.store import Accepted, Jobs, new_job_id
from shared.jobs.submission import NO_WEBHOOKS, Submission
from shared.models.catalog import Catalog
from shared.models.registry import ModelCard
from shared.models.sampling_defaults import SamplingDefaults
from shared.queue.wakeups import Notifier
from shared.settings import Settings
from shared.tokenizing.messages import Tokenized
from web.admission.capabilities import check_capabilities
from web.admission.generation import GenerationRequests, given_tokens
from web.admission.inputs import InputRequests, check_kind
from web.admission.model_choice import ModelChoice, choose_model
from web.admission.prefix_hashes import adapter_hash, prefix_hashes
from web.admission.prompt_tokenizer import PromptTokenizer, image_token_count
from web.cluster.snapshot import Cluster
from web.schemas.inputs import InputsRequest
from web.schemas.requests import JobRequest
from web.schemas.webhooks import JobEvent

log = logging.getLogger(__name__)

AnyRequest: TypeAlias = JobRequest | InputsRequest

MAX_SEED: Final = 2**63


@dataclass(frozen=True, slots=True)
class RequestContext:
    """What a job needs to know of its HTTP request, besides the body.

    Attributes:
        owner: id of the API key.
        idempotency_key: the Idempotency-Key header; empty if absent.
        fingerprint: hash of the request's meaning; empty if the request cannot be repeated.
        job_id: id of the first job; empty for a new one.
        reader: id of this process if the client repeats its request by itself; see `shared.jobs.readers`.
        limits: what the API key may use.
        max_priority: the highest priority that the API key may use.
        silent: whether the end of the job causes no webhook event.
        prepare: called with the first job's id right before the jobs are accepted.
        in_background: whether the job generates a background response, whose end causes a webhook event.
        traceparent, tracestate: W3C trace context of the HTTP request; empty if it is not traced.
        min_retention_s: minimum time for which the finished job is kept.
    """

    owner: str
    request_id: str = ""
    idempotency_key: str = ""
    fingerprint: str = ""
    limits: OwnerLimits = STANDARD
    max_priority: Priority = Priority.HIGH
    job_id: str = ""
    reader: str = ""
    silent: bool = False
    prepare: Callable[[str], object] = lambda _: None
    in_background: bool = False
    traceparent: str = ""
    tracestate: str = ""
    min_retention_s: int = 0


class Admission:
    """Checks requests and creates jobs.

    Args:
        load_on_demand: starts loading a model that no worker has.
        check_load_on_demand: raises `Unavailable` if such a model cannot be loaded.
        check_available: raises `NotFound` or `Invalid` if such a model can never be served.
        check_redis: raises `RedisUnsuitable` if Redis must not hold jobs.
        check_webhook_url: raises `Invalid` if an API key may not send webhooks to a URL, given also the field's name.
    """

    def __init__(
        self,
        settings: Settings,
        catalog: Catalog,
        jobs: Jobs,
        images: ImageStore,
        cluster: Cluster,
        prompt_tokenizer: PromptTokenizer,
        notifier: Notifier,
        load_on_demand: Callable[[str], object] = lambda _: None,
        check_load_on_demand: Callable[[str], object] = lambda _: None,
        check_available: Callable[[str], object] = lambda _: None,
        check_redis: Callable[[], object] = lambda: None,
        check_webhook_url: Callable[[str, str, str], object] = lambda *_: None,
    ) -> None:
        self._settings = settings
        self._catalog = catalog
        self._requests = GenerationRequests(settings, catalog, cluster)
        self._input_requests = InputRequests(cluster, prompt_tokenizer)
        self._jobs = jobs
        self._images = images
        self._cluster = cluster
        self._prompt_tokenizer = prompt_tokenizer
        self._notifier = notifier
        self._load_on_demand = load_on_demand
        self._check_load_on_demand = check_load_on_demand
        self._check_available = check_available
        self._check_redis = check_redis
        self._check_webhook_url = check_webhook_url

    def admit(
        self,
        request: AnyRequest,
        context: RequestContext,
        files: Mapping[str, bytes] | None = None,
        skipped_images: int = 0,
    ) -> Accepted:
        """Create a job, or find the job that the same request created before.

        Args:
            files: the images that the messages refer to, by digest.
            skipped_images: number of further images that were not read, because the request seems to be a repetition.
                If it turns out to be new, no job is created.

        Raises:
            Invalid: the request cannot be run; nothing was enqueued.
            Forbidden: the API key may not use the priority.
            NotFound: there is no such model.
            Conflict: no worker has the model, and models are not loaded on demand.
            RateLimited: the API key has reached one of its limits.
            Unavailable: the queue is full, the model cannot be loaded, or Redis must not hold jobs.
            redis.RedisError: Redis is unavailable.
        """
        return self.admit_all([request], context, files, skipped_images)

    def admit_all(
        self,
        requests: Sequence[AnyRequest],
        context: RequestContext,
        files: Mapping[str, bytes] | None = None,
        skipped_images: int = 0,
        choices: int = 1,
    ) -> Accepted:
        """Create `choices` jobs for each request, or none. Returns the first; the others are its children.

        The requests have the same model, priority and time limits. Raises like `admit`.
        """
        files = files or {}
        count, size = len(files) + skipped_images, sum(map(len, files.values()))
        each_once = [replace(self.submission(each, context), images=count, image_bytes=size) for each in requests]
        submissions = [choice for submission in each_once for choice in _choices(submission, choices)]
        job_ids = [context.job_id or new_job_id(), *(new_job_id() for _ in submissions[1:])]
        accepted = self._create(submissions, job_ids, files, context.prepare)
        if accepted.new and self._settings.log_prompts:
            _log_prompts(accepted.job, each_once)
        return accepted

    def repeat(self, submission: Submission, job_id: str) -> Accepted:
        """Create a job from the stored request of another one. Its images are stored under `job_id` already.

        Raises: as `admit`.
        """
        return self._create([submission], [job_id], {}, lambda _: None)

    def _create(
        self,
        submissions: Sequence[Submission],
        job_ids: Sequence[str],
        files: Mapping[str, bytes],
        prepare: Callable[[str], object],
    ) -> Accepted:
        self._check_redis()
        try:
            # Written before the job: the proof that the job is on disk also covers everything written before it.
            prepare(job_ids[0])
            for job_id in job_ids if files else ():
                self._images.put(job_id, files)
            accepted = self._jobs.create_all(submissions, job_ids)
        except (Invalid, RateLimited, Unavailable, OutOfMemoryError) as refused:
            if files and not isinstance(refused, NotDurable):  # NotDurable: the job may exist
                self._drop_images(job_ids)
            raise
        if files and not accepted.new:
            self._drop_images(job_ids)
        if accepted.wake:
            self._notifier.wake([accepted.job.model])
        if accepted.new:
            self._request_model(accepted.job)
        return accepted

    def _drop_images(self, job_ids: Sequence[str]) -> None:
        for job_id in job_ids:
            self._images.drop(job_id)

    def submission(self, request: AnyRequest, context: RequestContext) -> Submission:
        """Return the job that a request describes, with all defaults filled in.

        Raises:
            Invalid: the request cannot be run.
        """
        model, card, adapter = self._resolve(request)
        self._check_loaded(model, context)
        if isinstance(request, InputsRequest):
            inputs = self._input_requests.admit(request, model, self._kind(model, card), card)
            submission = self._submission(request, inputs.request, context)
            return replace(submission, tokens=inputs.tokens, result_bytes=inputs.result_bytes)
        return self._generation(request, model, card, context, adapter)

    def _generation(
        self, request: JobRequest, model: str, card: ModelCard | None, context: RequestContext, adapter: str | None
    ) -> Submission:
        generation = self._requests.build(request, model, card, adapter)
        check_kind(generation, self._kind(model, card))
        self._check_images(generation, card)
        if request.webhook_url is not None:
            self._check_webhook_url(request.webhook_url, "webhook_url", context.owner)
        check_capabilities(generation, card, self._cluster.snapshot())
        self._prompt_tokenizer.check_constraints(generation)
        tokenized = given_tokens(request, card) or self._tokenized(request, generation, card)
        return replace(
            self._submission(request, generation, context),
            reserved_tokens=self._requests.reserved_tokens(request, generation),
            prefixes=self._prefixes(generation, request.prompt_tokens or (), context.owner),
            tokens=tokenized.tokens if tokenized else None,
            shared=tokenized.shared if tokenized else 0,
            image_tokens=image_token_count(card, generation, request.prompt_field) if card else 0,
            webhook=NO_WEBHOOKS if context.silent else _webhook(request),
        )

    def _submission(self, body: AnyRequest, request: Request, context: RequestContext) -> Submission:
        """Return what jobs of all kinds have in common."""
        return Submission(
            request=request,
            owner=context.owner,
            priority=_priority(body, context.max_priority),
            limits=context.limits,
            metadata=body.metadata,
            request_id=context.request_id,
            idempotency_key=context.idempotency_key,
            fingerprint=context.fingerprint,
            reader=context.reader,
            start_within_s=_limited("start_within_s", body.start_within_s, self._settings.max_start_within_s),
            deadline_s=_limited("deadline_s", body.deadline_s, self._settings.max_deadline_s),
            webhook=NO_WEBHOOKS if context.silent else "",
            in_background=context.in_background,
            traceparent=context.traceparent,
            tracestate=context.tracestate,
            min_retention_s=context.min_retention_s,
        )

    def _kind(self, model: str, card: ModelCard | None) -> str | None:
        """Return a model's kind; None if it is not known."""
        entry = self._catalog.models.get(model)
        return card.kind if card else entry.declared_kind if entry else None

    def _tokenized(self, request: JobRequest, generation: Request, card: ModelCard | None) -> Tokenized | None:
        """Tokenise the prompt; None if a worker has to do it."""
        return None if card is None else self._prompt_tokenizer.tokenize(card, generation, request.prompt_field)

    def _prefixes(self, generation: Request, tokens: Sequence[int], owner: str) -> tuple[str, ...]:
        hashes = prefix_hashes(generation, owner, tokens) if self._settings.prefix_cache_bytes else ()
        return (*hashes, *adapter_hash(generation))

    def sampling_defaults(self, name: str | None) -> SamplingDefaults:
        """Return the sampling defaults of a model, by its id or an alias."""
        entry, _ = self._catalog.resolve_adapter(name)
        return self._requests.sampling_defaults(entry.id if entry else name or self._catalog.default)

    def count_tokens(self, request: JobRequest) -> int:
        """Return how many tokens the prompt of a request has, with its images, whose sizes are known.

        Raises:
            Invalid: the prompt cannot be tokenised.
            NotFound: there is no such model.
            Unavailable: the API does not have the model's tokenizer.
        """
        model, card, _ = self._resolve(request)
        generation = self._requests.build(request, model, card)
        self._check_images(generation, card)
        count = None if card is None else self._prompt_tokenizer.count(card, generation, request.prompt_field)
        if count is None:
            detail = f"The tokenizer of {model!r} is not available yet. A worker announces it after loading the model."
            raise Unavailable(detail, field="model", retry_after=5)
        return count

    def _resolve(self, request: AnyRequest) -> ModelChoice:
        adapter = request.adapter if isinstance(request, JobRequest) else None
        return choose_model(self._catalog, self._cluster.snapshot(), request.model, adapter)

    def _check_loaded(self, model: str, context: RequestContext) -> None:
        """Refuse a new job for a model that no worker has and that will not be loaded on demand."""
        known = self._jobs.key_is_used
        if self._cluster.snapshot().has(model) or known(context.owner, context.idempotency_key):
            return
        self._check_available(model)
        if self._settings.load_on_demand:
            self._check_load_on_demand(model)
            return
        snapshot = self._cluster.snapshot(max_age_s=0)
        # While there is no worker at all, jobs for the default model are accepted: one may be starting.
        if not snapshot.has(model) and (snapshot.hosts or model != self._catalog.default):
            detail = f"No worker has the model {model!r} loaded. Load it with POST /inference/load_model."
            raise Conflict(detail, code="model_not_loaded", field="model")

    def _check_images(self, generation: Request, card: ModelCard | None) -> None:
        model = generation.model
        entry = self._catalog.models.get(model)
        if self._kind(model, card) == "text" and generation.image_parts:
            text_only = card.text_only if card else entry is not None and entry.text_only
            what = "is served without its image encoder" if text_only else "is a text model"
            detail = f"model: {model} {what} and does not accept images. Use a vision model."
            raise Invalid(detail, code="no_images", field="model")

    def _request_model(self, job: Job) -> None:
        """Load the job's model if no worker has it. If Redis fails now, maintenance tries again."""
        try:
            if not self._cluster.snapshot().has(job.model):
                self._load_on_demand(job.model)
        except redis.RedisError as error:
            extra = {"model": job.model, "job_id": job.id, "reason": str(error)}
            log.warning("load_on_demand_failed", extra=extra)


def _choices(submission: Submission, count: int) -> list[Submission]:
    """Return a submission for each choice. Their seeds follow each other, so that one seed determines them all."""
    request, sampling = submission.request, submission.request.sampling
    seeds = [(sampling.seed + number) % MAX_SEED for number in range(count)]
    requests = [replace(request, sampling=replace(sampling, seed=seed)) for seed in seeds]
    return [replace(submission, request=each, repeats_prompt=n > 0) for n, each in enumerate(requests)]


def _priority(request: AnyRequest, highest: Priority) -> Priority:
    """Return the priority of a job. The default is lowered to what the API key may use; a higher one is refused."""
    priority = Priority[request.priority.upper()]
    if priority >= highest:
        return priority
    if "priority" in request.model_fields_set:
        detail = f"This API key may use at most priority {highest.label!r}."
        raise Forbidden(detail, code="priority_not_allowed", field="priority")
    return highest


def _webhook(request: JobRequest) -> str:
    if request.webhook_url is None:
        return ""
    return json.dumps({"url": request.webhook_url, "events": request.webhook_events or get_args(JobEvent)})


def _limited(field: str, value: float | None, maximum: float) -> float | None:
    if value is not None and value > maximum:
        raise Invalid(f"{field} can be at most {maximum:.15g} seconds.", field=field)
    return value


def _log_prompts(job: Job, submissions: Sequence[Submission]) -> None:
    """Log what a request asks for. Images appear as their digests."""
    for submission in submissions:
        request = submission.request
        log.info("prompt", extra={"job_id": job.id, "prompt": request.prompt, "messages": request.messages})
