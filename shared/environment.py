"""Variables in the environment and in `.env` that are not settings: variables of libraries, and misspelled settings.

Celery, Flower, gunicorn and Flask read variables of their own, most of which override the arguments that a program
passes. A variable that was set for another application could redirect messages or open another port. So these variables
are removed from the environment of the process and its children before the libraries read them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, MutableMapping
from difflib import get_close_matches
from typing import Final

logger = logging.getLogger(__name__)

_PREFIXES: Final = ("CELERY", "FLASK_", "FLOWER_", "KOMBU_", "PROMETHEUS_", "C_BENCH")
_NAMES: Final = frozenset(
    {
        "AUTOSCALE_KEEPALIVE",  # Celery
        "DEBUG_METRICS",  # prometheus_flask_exporter
        "GUNICORN_CMD_ARGS",
        "FORWARDED_ALLOW_IPS",  # gunicorn: proxies whose headers it trusts
        "MLXLM_USE_MODELSCOPE",  # mlx-lm: another hub
        "MLX_VLM_USE_MODELSCOPE",
        "SCRIPT_NAME",  # gunicorn: a prefix of every path
        "SENDFILE",  # gunicorn
        "WEB_CONCURRENCY",  # gunicorn: number of processes
    }
)
_OURS: Final = frozenset(
    {"FLOWER_HOST", "FLOWER_PASSWORD", "FLOWER_PORT", "FLOWER_URL", "FLOWER_USER", "PROMETHEUS_MULTIPROC_DIR"}
)
"""Settings with such a prefix, and a variable that `web/gunicorn.conf.py` sets."""


def is_foreign(name: str) -> bool:
    """Whether a variable would let a library override settings."""
    return name not in _OURS and (name in _NAMES or name.startswith(_PREFIXES))


def drop_foreign_variables(environment: MutableMapping[str, str]) -> list[str]:
    """Remove the variables of libraries, log their names and return these."""
    dropped = sorted(name for name in environment if is_foreign(name))
    for name in dropped:
        del environment[name]
    if dropped:
        logger.warning("environment_variables_ignored", extra={"names": dropped})
    return dropped


BASE_IMAGES: Final = frozenset({"PYTHON_IMAGE", "REDIS_IMAGE", "PROMETHEUS_IMAGE", "GRAFANA_IMAGE"})
COMPOSE_VARIABLES: Final = BASE_IMAGES | {
    *("ACCELERATOR", "MODELS_DIR", "REDIS_PORT", "GRAFANA_PORT"),
    *("REDIS_MAXMEMORY", "REDIS_MEMORY", "WEB_MEMORY", "WORKER_MEMORY"),
}
"""Variables of compose.yaml, which reads the same `.env`."""
_OPENTELEMETRY: Final = re.compile(r"OTEL_EXPORTER_(OTLP_(LOGS|METRICS|TRACES)|ZIPKIN)_\w+")
"""OpenTelemetry's own variables whose names are similar to those of settings."""
_CLOSE: Final = 0.85
"""Minimum similarity, from 0 to 1, of a misspelled name to a setting."""


def unknown_names(names: Iterable[str], settings: Iterable[str]) -> dict[str, str]:
    """Return the names in `.env` that nothing reads, each with the most similar setting, or an empty string."""
    known = {name.upper() for name in settings}
    unknown = [name.upper() for name in names if not name.upper().startswith("COMPOSE_")]
    return {name: closest(name, known) for name in unknown if name not in known | COMPOSE_VARIABLES}


def misspelled_names(names: Iterable[str], settings: Iterable[str]) -> dict[str, str]:
    """Return the names in the environment that are probably misspelled settings, each with that setting."""
    known = {name.upper() for name in settings}
    others = [
        name for name in names if name not in known | COMPOSE_VARIABLES | _OURS and not _OPENTELEMETRY.fullmatch(name)
    ]
    return {name: setting for name in others if (setting := closest(name, known))}


def closest(name: str, settings: Iterable[str]) -> str:
    """Return the setting with the most similar name; an empty string if none is similar."""
    return next(iter(get_close_matches(name, settings, n=1, cutoff=_CLOSE)), "")
