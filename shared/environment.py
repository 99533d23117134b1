"""Names in the environment and in `.env` that are not ours: variables of libraries, and misspelled settings.

Celery, Flower, gunicorn and Flask read variables by themselves, and most of these win over what a program passes. A
variable that was set for another application could redirect our messages or open another port. Such variables are
removed from the environment of the process, and so of its children, before the libraries read them.
"""

from __future__ import annotations

import logging
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
        "FORWARDED_ALLOW_IPS",  # gunicorn: whose forwarded headers it trusts
        "MLXLM_USE_MODELSCOPE",  # mlx-lm: another hub
        "MLX_VLM_USE_MODELSCOPE",
        "SCRIPT_NAME",  # gunicorn: a prefix of every path
        "SENDFILE",  # gunicorn
        "WEB_CONCURRENCY",  # gunicorn: number of processes
    }
)
_OURS: Final = frozenset({"FLOWER_PASSWORD", "FLOWER_PORT", "FLOWER_URL", "FLOWER_USER", "PROMETHEUS_MULTIPROC_DIR"})
"""Our own settings, and what `web/gunicorn.conf.py` sets itself."""


def is_foreign(name: str) -> bool:
    """Whether a library reads this variable to override what our settings say."""
    return name not in _OURS and (name in _NAMES or name.startswith(_PREFIXES))


def drop_foreign_variables(environment: MutableMapping[str, str]) -> list[str]:
    """Remove the variables that only libraries read, log their names, and return them."""
    dropped = sorted(name for name in environment if is_foreign(name))
    for name in dropped:
        del environment[name]
    if dropped:
        logger.warning("environment_variables_ignored", extra={"names": dropped})
    return dropped


_COMPOSE: Final = frozenset({"MODELS_DIR", "PYTHON_IMAGE", "REDIS_IMAGE", "REDIS_MAXMEMORY", "REDIS_PORT"})
"""Variables of compose.yaml, which reads the same `.env`."""
_CLOSE: Final = 0.85
"""Similarity, from 0 to 1, from which a name is taken for a misspelled setting."""


def unknown_names(names: Iterable[str], settings: Iterable[str]) -> dict[str, str]:
    """Of names in `.env`: those that nothing reads, each with the setting that was probably meant, or an empty text."""
    known = {name.upper() for name in settings}
    unknown = [name.upper() for name in names if not name.upper().startswith("COMPOSE_")]
    return {name: closest(name, known) for name in unknown if name not in known | _COMPOSE}


def misspelled_names(names: Iterable[str], settings: Iterable[str]) -> dict[str, str]:
    """Of names in the environment: those that are probably misspelled settings, each with the setting meant."""
    known = {name.upper() for name in settings}
    found = {name: closest(name, known) for name in names if name not in known | _COMPOSE | _OURS}
    return {name: meant for name, meant in found.items() if meant}


def closest(name: str, settings: Iterable[str]) -> str:
    """The setting whose name is most similar; empty if none is similar."""
    return next(iter(get_close_matches(name, settings, n=1, cutoff=_CLOSE)), "")
