"""Variables of libraries do not override settings: every variable that a library reads is known."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

from shared.environment import drop_foreign_variables, is_foreign
from shared.load_settings import load_settings
from shared.settings import Settings

LIBRARIES = [
    *("celery", "kombu", "flower", "gunicorn", "flask", "flask_limiter", "limits", "prometheus_flask_exporter"),
    *("redis", "mlx_lm"),
]
READ = re.compile(r"""(?:environ(?:\.get|\.pop|\.setdefault)?[\[(]|getenv\()\s*["']([A-Z][A-Z0-9_]+)["']""")

_HARMLESS_TEXT = """
of the system and the terminal:
    COMP_CWORD COMP_WORDS ITERM_PROFILE LISTEN_FDS LISTEN_PID NOTIFY_SOCKET NO_COLOR PWD PYTHONSTARTUP
    SERVER_SOFTWARE TERM XDG_CONFIG_HOME XDG_RUNTIME_DIR
of parts of libraries that are not used:
    AZURE_STORAGE_ACCOUNT AZURE_STORAGE_KEY DJANGO_SETTINGS_MODULE FORKED_BY_MULTIPROCESSING MP_MAIN_FILE
    NO_WORKER PICKLE_PROTOCOL PUBSUB_EMULATOR_HOST SLMQ_ACCOUNT SLMQ_HOST SLMQ_PORT SLMQ_SECURE SL_API_KEY
    SL_USERNAME TEST_BROKER TOKENIZERS_PARALLELISM TRANSFORMERS_NO_ADVISORY_WARNINGS USE_FAST_LOCALS
    WORKER_LOGLEVEL YOURAPPLICATION_SETTINGS
of diagnostics, which do not change behaviour:
    C_FAKEFORK C_FORCE_ROOT C_IMPDEBUG C_REMDEBUG C_STRICT_APP C_WARN_APP C_WNOCONF DISABLE_TRACEBACKS
    EVENTLET_NOBLOCK MLX_GDN_PACKED MP_LOG NOSETPS TIMER_DEBUG
for communication between gunicorn's processes:
    GUNICORN_DIRTY_SOCKET GUNICORN_FD GUNICORN_PID
keys of a WSGI request, which look the same in the source:
    CONTENT_LENGTH CONTENT_TYPE HTTP_AUTHORIZATION HTTP_REFERER HTTP_USER_AGENT HTTP_VERSION PATH_INFO
    QUERY_STRING RAW_URI REMOTE_ADDR REMOTE_PORT REQUEST_METHOD SERVER_NAME SERVER_PORT SERVER_PROTOCOL
set by our own configuration:
    PORT PROMETHEUS_MULTIPROC_DIR
"""
HARMLESS = set(re.findall(r"\b[A-Z][A-Z0-9_]{2,}\b", _HARMLESS_TEXT))


def variables_read(library: str) -> Iterator[str]:
    spec = PathFinder.find_spec(library)
    assert spec is not None
    assert spec.origin is not None
    for path in Path(spec.origin).parent.rglob("*.py"):
        yield from READ.findall(path.read_text(errors="replace"))


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_variable_that_a_library_reads_is_dropped_or_known_to_be_harmless(library: str) -> None:
    names = set(variables_read(library))
    assert {name for name in names if not is_foreign(name) and name not in HARMLESS} == set()


def test_no_setting_is_dropped() -> None:
    assert [name for name in Settings.model_fields if is_foreign(name.upper())] == []


def test_loading_settings_drops_the_variables_of_libraries(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    foreign = ("CELERY_BROKER_URL", "CELERY_CONFIG_MODULE", "FLOWER_ADDRESS", "GUNICORN_CMD_ARGS", "WEB_CONCURRENCY")
    for name in foreign:
        monkeypatch.setenv(name, "redis://elsewhere")
    monkeypatch.setenv("FLOWER_USER", "somebody")
    assert load_settings().flower_user == "somebody"
    (record,) = caplog.records
    assert (record.message, record.names) == ("environment_variables_ignored", sorted(foreign))  # type: ignore[attr-defined]


def test_environment_without_variables_of_libraries_is_not_changed() -> None:
    environment = {"PATH": "/bin", "FLOWER_PORT": "1"}
    assert drop_foreign_variables(environment) == []
    assert environment == {"PATH": "/bin", "FLOWER_PORT": "1"}
