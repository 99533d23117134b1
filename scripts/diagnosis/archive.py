"""Facts about the archive of ended jobs: where it is, its size, and whether it can be used."""

from __future__ import annotations

from contextlib import suppress
from typing import Final

import redis

from scripts.diagnosis.report import Section, size
from shared.redis.client import connect
from shared.settings import Settings
from web.archive.database import Archive, ArchiveUnavailable
from web.cluster.archive_state import read_state

_TIMEOUT_S: Final = 2.0


def check_archive(settings: Settings) -> Section:
    """Report the archive of this machine, and what the background process says about it."""
    section = Section("Archive")
    if settings.archive_file is None:
        section.facts["state"] = "off (ARCHIVE_URL)"
        return section
    archive = Archive(settings.archive_file)
    try:
        _check_file(archive, section)
    except ArchiveUnavailable as error:
        section.problems.append(f"{error.detail}; see docs/archive.md")
    finally:
        archive.close()
    if not settings.embedded_redis or settings.redis_socket.exists():
        _check_state(settings, section)
    return section


def _check_file(archive: Archive, section: Section) -> None:
    section.facts["file"] = str(archive.file)
    if not archive.file.exists():
        section.facts["state"] = "nothing was archived yet"
        return
    section.facts["content"] = size(archive.used_bytes())
    newest = archive.last_usage_day()
    section.facts["last day with usage"] = "none" if newest is None else newest.isoformat()


def _check_state(settings: Settings, section: Section) -> None:
    with (
        suppress(redis.RedisError, ValueError, OSError),  # the check of Redis reports why it cannot be used
        connect(settings.store_url, timeout_s=_TIMEOUT_S, retries=0) as client,
    ):
        state = read_state(client)
        section.facts["jobs written"] = f"{state.written:,}"
        section.facts["jobs that wait"] = f"{state.waiting:,}"
        if state.problem:
            section.problems.append(state.problem)
