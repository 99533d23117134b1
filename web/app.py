"""The Flask application."""

from __future__ import annotations

from flask import Flask

from shared.queue.redis import Redis
from shared.settings import Settings, load_settings
from web.access import auth, rate_limits
from web.access.api_keys import KeyStore
from web.http import problems
from web.http.request import refuse_unknown_parameters
from web.http.request_id import Correlation
from web.routes import health, inference, jobs, models, openai_models, openapi
from web.services import EXTENSION, build


def create_app(settings: Settings | None = None, client: Redis | None = None) -> Flask:
    """Make the application; one per process, after the fork.

    Args:
        settings: default: the environment's.
        client: Redis for everything, in tests.
    """
    settings = settings or load_settings()
    services = build(settings, client)
    keys = KeyStore(settings.keys_file)

    app = Flask("web", static_folder=None)
    app.url_map.merge_slashes = False  # its redirect would be a page, and an empty job id is no job
    app.config["MAX_CONTENT_LENGTH"] = settings.max_body_bytes
    app.config["MAX_FORM_MEMORY_SIZE"] = settings.max_body_bytes  # of what is no file: a long conversation, say
    app.wsgi_app = Correlation(app.wsgi_app)  # type: ignore[method-assign]
    app.extensions[EXTENSION] = services

    services.metrics.register(app)
    # The limiter stands between the two halves of authentication, so that it counts refused requests as well.
    app.before_request(lambda: auth.identify(keys))
    rate_limits.register(app, settings)
    app.before_request(auth.require_key)
    app.before_request(refuse_unknown_parameters)
    problems.register(app)
    for module in (jobs, inference, models, openai_models, health, openapi):
        app.register_blueprint(module.routes)
    return app
