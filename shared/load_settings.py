"""Reads the settings of a process, and rejects what would otherwise be ignored."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

from dotenv import dotenv_values
from pydantic import ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from shared.environment import drop_foreign_variables, unknown_names
from shared.locations import TLS_FILES
from shared.redis.urls import unusable_tls_files
from shared.settings import ENV_FILE, Settings


def load_settings(*, env_file_may_be_missing: bool = False) -> Settings:
    """Read the environment and `.env`, and remove variables of libraries that would override settings.

    Args:
        env_file_may_be_missing: accept that the file named by ENV_FILE does not exist.

    Raises:
        pydantic.ValidationError: a variable is invalid or unknown; the error names each of them.
    """
    drop_foreign_variables(os.environ)
    settings = Settings()
    problems = {**dict(_unknown_settings()), **_unusable_tls_files(settings)}
    if "ENV_FILE" in os.environ and not ENV_FILE.exists() and not env_file_may_be_missing:
        problems["env_file"] = f"{ENV_FILE} does not exist"
    if "models_file" in settings.model_fields_set and not settings.models_file.exists():
        problems["models_file"] = f"{settings.models_file} does not exist"
    if problems:
        raise ValidationError.from_exception_data(
            "settings", [_error(name, reason) for name, reason in problems.items()]
        )
    return settings


def _unknown_settings() -> Iterator[tuple[str, str]]:
    if ENV_FILE.is_file():
        for name, similar in unknown_names(dotenv_values(ENV_FILE), Settings.model_fields).items():
            yield name, f"no such setting (in {ENV_FILE})" + f"; did you mean {similar}?" * bool(similar)


def _unusable_tls_files(settings: Settings) -> dict[str, str]:
    servers = filter(None, (settings.redis_url, settings.broker_url))
    return unusable_tls_files(servers, {name: getattr(settings, name) for name in TLS_FILES})


def _error(name: str, reason: str) -> InitErrorDetails:
    # The reason is passed as a parameter because braces in it would be parsed as part of the template.
    kind = PydanticCustomError("setting", "{reason}", {"reason": reason})
    return InitErrorDetails(type=kind, loc=(name,), input=None)


def load_or_exit() -> Settings:
    """Load the settings, or exit with one line per invalid variable."""
    try:
        return load_settings()
    except ValidationError as error:
        sys.exit(faults(error))


def faults(error: ValidationError) -> str:
    """Format a validation error as one line per variable."""
    return "\n".join(
        f"{'.'.join(map(str, each['loc'])).upper() or 'settings'}: {each['msg'].removeprefix('Value error, ')}"
        for each in error.errors()
    )
