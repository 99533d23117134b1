"""Checks of settings that depend on more than a type and a range."""

from __future__ import annotations

import re
from ipaddress import ip_network
from typing import Final, Self

from pydantic import SecretStr, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings

from shared.locations import ROOT, TLS_FILES
from shared.redis import urls

_IN_ORDER: Final = {
    "max_start_within_s": ("start_within_s", "max_start_within_s"),
    "body_memory_bytes": ("max_body_bytes", "body_memory_bytes"),
    "max_deadline_s": ("deadline_s", "max_deadline_s"),
    "log_retention_s": ("log_retention_s", "retention_s"),
}
"""Pairs of settings of which the first must not exceed the second, by the one that is validated last."""


class SettingsChecks(BaseSettings):
    """The part of `shared.settings.Settings` that validates its fields."""

    @field_validator("redis_url", check_fields=False)
    @classmethod
    def _redis_url_is_valid(cls, url: str) -> str:
        return url and urls.check_store(url)

    @field_validator("broker_url", check_fields=False)
    @classmethod
    def _broker_url_is_valid(cls, url: str) -> str:
        return url and urls.check_broker(url)

    @model_validator(mode="after")
    def _paths_are_absolute(self) -> Self:
        # Relative paths are resolved against the repository, not the working directory.
        for name in ("data_dir", "model_path", "models_file", "files_dir", "responses_dir", *TLS_FILES):
            if (path := getattr(self, name)) is not None:
                object.__setattr__(self, name, ROOT / path.expanduser())
        return self

    @field_validator("archive_url", check_fields=False)
    @classmethod
    def _archive_url_is_valid(cls, url: str) -> str:
        if url not in ("auto", "off") and not re.fullmatch(r"sqlite:///[^?#]+", url):
            raise ValueError("use auto, off, or sqlite:/// and the path of a file; other databases are not supported")
        return url

    @field_validator("flower_user", "flower_password", check_fields=False)
    @classmethod
    def _is_ascii(cls, value: str | SecretStr, info: ValidationInfo) -> str | SecretStr:
        text = value if isinstance(value, str) else value.get_secret_value()
        if not (text.isascii() and text.isprintable()):
            raise ValueError("use printable ASCII characters only: Flower cannot compare others")
        if info.field_name == "flower_user" and ":" in text:
            raise ValueError("remove the colon: HTTP basic authentication does not allow one in a user name")
        return value

    @field_validator("max_start_within_s", "max_deadline_s", "log_retention_s", check_fields=False)
    @classmethod
    def _in_order(cls, value: float | None, info: ValidationInfo) -> float | None:
        field = str(info.field_name)
        names = _IN_ORDER[field]
        small, large = ({**info.data, field: value}.get(name) for name in names)
        if small is not None and large is not None and small > large:
            raise ValueError(f"{names[0].upper()} ({small:.15g}) is more than {names[1].upper()} ({large:.15g})")
        return value

    @field_validator("trusted_proxies", "webhook_networks", check_fields=False)
    @classmethod
    def _networks(cls, value: str) -> str:
        for each in filter(None, value.split(",")):
            ip_network(each.strip())
        return value
