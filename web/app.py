"""The Flask application."""

from __future__ import annotations

from typing import Final

from flask import Flask, Response, request

from shared.load_settings import load_settings
from shared.redis.client import Redis
from shared.settings import Settings
from web import console
from web.access import auth, rate_limits
from web.anthropic.routes import routes as anthropic_routes
from web.http import body, cors, limit_headers, problems, tracing
from web.http.environ import KnownMethods, ProxyMiddleware, networks, note_caller
from web.http.request import refuse_unknown_parameters
from web.http.request_id import RequestIdMiddleware
from web.openai.inputs import routes as input_routes
from web.openai.routes import routes as openai_routes
from web.routes import (
    batches,
    downloads,
    files,
    health,
    inference,
    job_requests,
    jobs,
    keys,
    models,
    openapi,
    overview,
    responses,
    usage,
    webhooks,
)
from web.services import EXTENSION, Services, build

_SECURITY_HEADERS: Final = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


def create_app(settings: Settings | None = None, client: Redis | None = None) -> Flask:
    """Create the application; once per process, after gunicorn has forked it.

    Args:
        settings: default: the environment's.
        client: a Redis client to use for everything, in tests.
    """
    settings = settings or load_settings()
    services = build(settings, client)

    app = Flask("web", static_folder=None)
    app.url_map.merge_slashes = False  # a path with an empty job id must be 404, not a redirect
    app.url_map.converters["response"] = responses.ResponseIdConverter
    app.config["MAX_CONTENT_LENGTH"] = settings.max_body_bytes
    proxied = ProxyMiddleware(app.wsgi_app, networks(settings.trusted_proxies))
    app.wsgi_app = RequestIdMiddleware(KnownMethods(proxied))  # type: ignore[method-assign]
    app.extensions[EXTENSION] = services
    if services.tracer is not None:
        tracing.register(app, services.tracer)

    services.metrics.register(app)
    cors.register(app, settings.cors_origins)
    # The rate limiter runs between the two steps of authentication, so that it also counts unauthenticated requests.
    app.before_request(lambda: auth.identify(services.keys, services.sessions))
    rate_limits.register(app, settings, limit_headers.add_headers)
    app.before_request(auth.require_key)
    app.before_request(refuse_unknown_parameters)
    app.before_request(lambda: _refresh_catalog(services))
    body.register(app, settings.body_memory_bytes)
    problems.register(app)
    app.after_request(_add_security_headers)
    app.after_request(note_caller)
    for routes in (
        jobs.routes,
        job_requests.routes,
        inference.routes,
        models.routes,
        downloads.routes,
        openai_routes,
        input_routes,
        anthropic_routes,
        responses.routes,
        files.routes,
        batches.routes,
        webhooks.routes,
        keys.routes,
        overview.routes,
        usage.routes,
        health.routes,
        openapi.routes,
        console.routes,
    ):
        app.register_blueprint(routes)
    return app


def _refresh_catalog(services: Services) -> None:
    """Learn of added models, except for health checks: these must not wait for Redis."""
    if request.blueprint != health.routes.name:
        services.catalog_updates.refresh_if_due()


def _add_security_headers(response: Response) -> Response:
    for name, value in _SECURITY_HEADERS.items():
        response.headers.setdefault(name, value)
    return response
