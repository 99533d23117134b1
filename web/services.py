"""Everything a process needs to serve requests, made once per process after the fork. Nothing connects before use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from flask import current_app

from shared.jobs.images import ImageStore
from shared.jobs.log import JobLog
from shared.jobs.store import Jobs
from shared.models.catalog import Catalog, load_catalog
from shared.models.operations import Operations
from shared.models.registry import Registry
from shared.queue.claims import Reaper
from shared.queue.maintenance import Maintenance
from shared.queue.redis import Redis, connect
from shared.queue.task_events import TaskEvents
from shared.queue.wakeups import Notifier, make_app
from shared.settings import Settings
from shared.tokenizing.client import Tokenizing
from shared.tokenizing.files import TokenizerFiles, TokenizerStore
from web.admission.admit import Admission
from web.admission.image_loader import ImageLoader
from web.admission.image_urls import ImageUrls
from web.admission.prompt_tokenizer import PromptTokenizer
from web.cluster.health_checker import HealthChecker
from web.cluster.model_manager import ModelManager
from web.cluster.ping import WorkerPing
from web.cluster.snapshot import Cluster
from web.metrics import Metrics
from web.results.job_views import Views
from web.streaming.follower import Follower
from web.streaming.hub import Hub

EXTENSION: Final = "mlxq"

_CALL_TIMEOUT_S: Final = 2.0
_PROBE_TIMEOUT_S: Final = 0.3


@dataclass(frozen=True, slots=True)
class Services:
    """The parts, wired."""

    settings: Settings
    catalog: Catalog
    model_manager: ModelManager
    jobs: Jobs
    cluster: Cluster
    registry: Registry
    admission: Admission
    image_loader: ImageLoader
    views: Views
    hub: Hub
    follower: Follower
    health_checker: HealthChecker
    metrics: Metrics
    maintenance: Maintenance
    events: TaskEvents


def build(settings: Settings, client: Redis | None = None) -> Services:
    """Wire the parts.

    Args:
        client: used for everything instead of connections of our own; for tests.
    """
    store = client or connect(settings.store_url, timeout_s=_CALL_TIMEOUT_S, retries=1)
    probe = client or connect(settings.store_url, timeout_s=_PROBE_TIMEOUT_S, retries=0)
    # RESP 2: there, a message on a channel is an ordinary answer.
    live = client or connect(settings.store_url, timeout_s=_CALL_TIMEOUT_S, retries=0, protocol=2)
    files = client or connect(settings.store_url, timeout_s=_CALL_TIMEOUT_S, retries=1, decode_responses=False)
    celery = make_app(settings, hasty=True)
    events = TaskEvents(celery, TaskEvents.QUEUE_NODE)
    registry = Registry(store)
    jobs, job_log, cluster, hub = Jobs(store, settings), JobLog(store), Cluster(registry), Hub(live)
    notifier = Notifier(celery)
    tokenizers = TokenizerFiles(settings.tokenizers_dir, TokenizerStore(files).get)
    catalog = load_catalog(settings)
    model_manager = ModelManager(celery, Operations(store), registry, catalog, on_demand=settings.load_on_demand)
    return Services(
        settings=settings,
        catalog=catalog,
        model_manager=model_manager,
        jobs=jobs,
        cluster=cluster,
        registry=registry,
        admission=Admission(
            settings,
            catalog,
            jobs,
            ImageStore(files),
            cluster,
            PromptTokenizer(Tokenizing(settings.template_timeout_s), tokenizers),
            notifier,
            model_manager.demand,
            model_manager.check_demand,
        ),
        image_loader=ImageLoader(settings, ImageUrls().fetch if settings.image_urls else None),
        views=Views(jobs, cluster, job_log),
        hub=hub,
        follower=Follower(job_log, hub, settings.heartbeat_s),
        health_checker=HealthChecker(settings, catalog, probe, WorkerPing(celery)),
        metrics=Metrics(Registry(probe)),
        maintenance=Maintenance(
            Reaper(store, settings.max_attempts, settings.failed_request_bytes),
            notifier,
            jobs,
            model_manager.demand_waiting,
            events.ended_without_worker,
        ),
        events=events,
    )


def services() -> Services:
    """Those of the application that serves the request."""
    found: Services = current_app.extensions[EXTENSION]
    return found
