"""The objects that serve requests, created once per process after the fork. They connect to Redis on first use."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Final, Self

from flask import current_app

from shared.jobs.images import ImageStore
from shared.jobs.log import JobLog
from shared.jobs.readers import Readers
from shared.jobs.record import EndedJob, Job
from shared.jobs.search import JobSearch
from shared.jobs.store import Jobs
from shared.jobs.stored_requests import StoredRequests
from shared.jobs.usage import UsageStore
from shared.models.additions import CatalogAdditions, CatalogUpdates
from shared.models.catalog import Catalog, load_catalog
from shared.models.operations import Operations
from shared.models.registry import Registry
from shared.queue.depths import QueueDepths
from shared.queue.job_spans import JobSpans
from shared.queue.maintenance import Maintenance
from shared.queue.recovery import Reaper
from shared.queue.task_events import TaskEvents
from shared.queue.wakeups import Notifier, make_app
from shared.redis import keys
from shared.redis.client import Redis, connect
from shared.redis.requirements import Process, Requirements
from shared.settings import Settings
from shared.tokenizing.client import Tokenizing
from shared.tokenizing.files import TokenizerFiles, TokenizerStore
from shared.tracing import Tracer, make_tracer
from web.access.api_keys import KeyStore
from web.access.open_responses import OpenResponses
from web.access.purges import Purges
from web.access.sessions import Sessions
from web.admission.admit import Admission
from web.admission.image_loader import ImageLoader
from web.admission.image_urls import ImageUrls
from web.admission.prompt_tokenizer import PromptTokenizer
from web.archive.database import Archive
from web.archive.history import History
from web.archive.queue import ArchiveQueue
from web.batches.store import Batches
from web.cluster.health_checker import HealthChecker
from web.cluster.model_availability import ModelAvailability
from web.cluster.model_downloads import ModelDownloads
from web.cluster.model_manager import ModelManager
from web.cluster.ping import WorkerPing
from web.cluster.samples import Samples
from web.cluster.snapshot import Cluster
from web.files.store import FileStore
from web.metrics import Metrics
from web.metrics.cluster import ClusterCollector
from web.responses.store import DiskResponses, RedisResponses, ResponseStore
from web.responses.stored import Responses
from web.results.job_views import JobViews
from web.streaming.follower import Follower
from web.streaming.hub import Hub
from web.webhooks.deliveries import Deliveries
from web.webhooks.receivers import Receivers, UrlPolicy

EXTENSION: Final = "mlxq"

_CALL_TIMEOUT_S: Final = 2.0
_PROBE_TIMEOUT_S: Final = 0.3


@dataclass(frozen=True, slots=True)
class Services:
    """The objects that routes use."""

    settings: Settings
    keys: KeyStore
    sessions: Sessions
    open_responses: OpenResponses
    catalog: Catalog
    catalog_updates: CatalogUpdates
    model_manager: ModelManager
    model_downloads: ModelDownloads
    jobs: Jobs
    job_search: JobSearch
    stored_requests: StoredRequests
    archive: Archive | None
    archive_queue: ArchiveQueue
    history: History
    purges: Purges
    usage: UsageStore
    job_log: JobLog
    readers: Readers
    cluster: Cluster
    registry: Registry
    queue_depths: QueueDepths
    samples: Samples
    prompt_tokenizer: PromptTokenizer
    admission: Admission
    image_loader: ImageLoader
    job_views: JobViews
    hub: Hub
    follower: Follower
    health_checker: HealthChecker
    metrics: Metrics
    maintenance: Maintenance
    events: TaskEvents
    files: FileStore
    batches: Batches
    responses: Responses
    response_store: ResponseStore
    receivers: Receivers
    deliveries: Deliveries
    webhook_urls: UrlPolicy
    tracer: Tracer | None


@dataclass(frozen=True, slots=True)
class _Clients:
    """Redis clients.

    Attributes:
        store: for the queue and everything else.
        probe: short timeout and no retries, for health checks and metrics.
        pubsub: for the hub. RESP 2, because there a published message is an ordinary reply.
        binary: returns bytes instead of text, for images and tokenizers.
    """

    store: Redis
    probe: Redis
    pubsub: Redis
    binary: Redis

    @classmethod
    def connect(cls, url: str) -> Self:
        return cls(
            store=connect(url, timeout_s=_CALL_TIMEOUT_S, retries=1),
            probe=connect(url, timeout_s=_PROBE_TIMEOUT_S, retries=0),
            pubsub=connect(url, timeout_s=_CALL_TIMEOUT_S, retries=0, protocol=2),
            binary=connect(url, timeout_s=_CALL_TIMEOUT_S, retries=1, decode_responses=False),
        )


def build(settings: Settings, client: Redis | None = None, *, process: Process = "web") -> Services:
    """Create all services.

    Args:
        client: a Redis client to use for everything, in tests.
        process: the kind of this process, whose permissions in Redis are checked.
    """
    clients = _Clients(client, client, client, client) if client is not None else _Clients.connect(settings.store_url)
    celery = make_app(settings, hasty=True)
    notifier, events = Notifier(celery), TaskEvents(celery, TaskEvents.QUEUE_NODE)
    images = ImageStore(clients.binary)
    catalog, registry = load_catalog(settings), Registry(clients.store)
    jobs, job_log = Jobs(clients.store, settings), JobLog(clients.store)
    cluster, hub = Cluster(registry), Hub(clients.pubsub)
    operations, on_demand = Operations(clients.store), settings.load_on_demand
    model_manager = ModelManager(celery, operations, registry, catalog, on_demand=on_demand)
    additions = CatalogAdditions(clients.store)
    catalog_updates = CatalogUpdates(settings, catalog, additions)
    response_store = _response_store(settings, clients.store)
    webhook_urls = UrlPolicy(settings.webhook_networks)
    availability = ModelAvailability(registry, operations, jobs, catalog, on_demand=on_demand)

    tracer = make_tracer(settings, f"mlxq-{process}", socket.gethostname())
    spans = JobSpans(tracer, "")

    def report_end(end: EndedJob) -> None:
        events.ended_without_worker(end)
        if spans.enabled and (record := clients.store.hgetall(keys.JOB + end.id)):
            spans.ended_without_worker(Job.from_record(record), end)

    def look_after_waiting_jobs() -> None:
        availability.round()
        model_manager.load_for_waiting_jobs()

    prompt_tokenizer = _prompt_tokenizer(settings, clients.binary)
    archive = Archive(settings.archive_file) if settings.archive_file is not None else None
    archive_queue, usage = ArchiveQueue(clients.store, settings.archive_content), UsageStore(clients.store)

    return Services(
        settings=settings,
        keys=KeyStore(settings.keys_file),
        sessions=Sessions(clients.store),
        open_responses=OpenResponses(settings.max_streams_per_key),
        catalog=catalog,
        catalog_updates=catalog_updates,
        model_manager=model_manager,
        model_downloads=ModelDownloads(operations, additions, catalog, catalog_updates, model_manager),
        jobs=jobs,
        job_search=JobSearch(clients.store),
        stored_requests=StoredRequests(clients.store, images),
        archive=archive,
        archive_queue=archive_queue,
        history=History(archive, archive_queue, jobs, usage),
        purges=Purges(clients.store),
        usage=usage,
        job_log=job_log,
        readers=Readers(clients.store),
        cluster=cluster,
        registry=registry,
        queue_depths=QueueDepths(clients.store),
        samples=Samples(clients.store),
        prompt_tokenizer=prompt_tokenizer,
        admission=Admission(
            settings,
            catalog,
            jobs,
            images,
            cluster,
            prompt_tokenizer,
            notifier,
            model_manager.load_on_demand,
            model_manager.check_load_on_demand,
            availability.check,
            Requirements(clients.store, process).check if client is None else lambda: None,  # a fake Redis has no ACL
            webhook_urls.check,
        ),
        image_loader=ImageLoader(settings, ImageUrls().fetch if settings.image_urls else None),
        job_views=JobViews(jobs, cluster, job_log),
        hub=hub,
        follower=Follower(job_log, hub, settings.heartbeat_s),
        health_checker=HealthChecker(settings, catalog, clients.probe, WorkerPing(celery)),
        metrics=Metrics([ClusterCollector(clients.probe)]),
        maintenance=Maintenance(
            Reaper(clients.store, settings.max_attempts, settings.failed_request_bytes, settings.keep_requests),
            notifier,
            jobs,
            look_after_waiting_jobs,
            report_end,
        ),
        tracer=tracer,
        events=events,
        receivers=Receivers(clients.store),
        deliveries=Deliveries(clients.store, settings.webhook_attempts, settings.webhook_backoff_s),
        webhook_urls=webhook_urls,
        batches=Batches(clients.store, durable=settings.durable, retention_s=settings.files_retention_s),
        responses=Responses(clients.store, response_store, jobs, job_log),
        response_store=response_store,
        files=FileStore(settings.files_path, settings.files_retention_s, settings.files_bytes_per_key),
    )


def services() -> Services:
    """Return the services of the application that serves the current request."""
    current: Services = current_app.extensions[EXTENSION]
    return current


def _response_store(settings: Settings, client: Redis) -> ResponseStore:
    if settings.responses_store == "redis":
        return RedisResponses(client, settings.responses_retention_s)
    return DiskResponses(settings.responses_path, settings.responses_retention_s)


def _prompt_tokenizer(settings: Settings, client: Redis) -> PromptTokenizer:
    files = TokenizerFiles(settings.tokenizers_dir, TokenizerStore(client).get)
    return PromptTokenizer(
        Tokenizing(settings.template_timeout_s, special_tokens_in_text=settings.special_tokens_in_text), files
    )
