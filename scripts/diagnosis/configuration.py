"""Settings, ports and model folders: what is configured, and whether it can be used."""

from __future__ import annotations

import os
from typing import Any, Final

import psutil
from pydantic import SecretStr, ValidationError

from scripts.diagnosis.report import Section, size
from scripts.stack import preflight, probes
from scripts.stack.failure import StartFailed
from scripts.stack.terminal import base_url
from shared.environment import misspelled_names
from shared.load_settings import faults, load_settings
from shared.models.catalog import Catalog, CatalogModel, load_catalog
from shared.models.folder import ModelError, check_folder
from shared.settings import Settings

_HIDDEN: Final = frozenset({"flower_user", "redis_url", "broker_url", "otel_exporter_otlp_endpoint"})
"""Settings whose value may contain credentials, beside those of the type SecretStr."""
_MODEL_SHARE: Final = 0.5
"""Share of the free memory that a model may take for the self-check: a running service needs the rest."""


def read_settings() -> tuple[Settings, Section]:
    """Return the settings, with the default in place of each invalid value, and what is wrong with them."""
    section = Section("Settings")
    try:
        settings = load_settings()
    except ValidationError as error:
        section.problems += [f"{line}; correct it in the environment or .env" for line in faults(error).splitlines()]
        settings = _valid_part(error)
    except (OSError, UnicodeDecodeError) as error:
        section.problems.append(
            f"ENV_FILE cannot be read ({type(error).__name__}): correct the file or its permissions"
        )
        settings = Settings(_env_file=None)
    for name, similar in misspelled_names(os.environ, Settings.model_fields).items():
        section.problems.append(f"{name} in the environment is not a setting: rename it to {similar}")
    section.facts = _differences(settings) or {"different from the defaults": "none"}
    return settings, section


def _valid_part(error: ValidationError) -> Settings:
    # Arguments have precedence over the environment.
    fields = Settings.model_fields
    invalid = {str(each["loc"][0]) for each in error.errors() if each["loc"]} & fields.keys()
    defaults: dict[str, Any] = {name: fields[name].get_default(call_default_factory=True) for name in invalid}
    try:
        return Settings(**defaults)
    except ValidationError:  # two settings contradict each other
        return Settings.model_construct()


def _differences(settings: Settings) -> dict[str, str]:
    return {
        name.upper(): _shown(name, value)
        for name, field in Settings.model_fields.items()
        if (value := getattr(settings, name)) != field.get_default(call_default_factory=True)
    }


def _shown(name: str, value: object) -> str:
    return "set (hidden)" if name in _HIDDEN or isinstance(value, SecretStr) else str(value)


def check_ports(settings: Settings) -> Section:
    """Report whether the ports are free, or in use by a running mlxq."""
    section = Section("Ports")
    api, flower = base_url(settings.host, settings.port), base_url(settings.flower_host, settings.flower_port)
    running = probes.is_ok(f"{api}/livez")
    section.facts = {
        "API": f"{api}, {'mlxq answers' if running else 'mlxq does not answer'}",
        "Flower": f"{flower}, {'answers' if probes.is_ok(f'{flower}/healthcheck') else 'does not answer'}",
    }
    if not running:
        try:
            preflight.check_ports(settings)
        except StartFailed as failure:
            section.problems.append(str(failure))
    return section


def check_models(settings: Settings) -> tuple[Section, Catalog]:
    """Report the models of the catalog and whether their folders are complete."""
    section = Section("Models")
    catalog = load_catalog(settings)
    section.problems += [f"catalog: {fault}" for fault in catalog.faults]
    for model in catalog.models.values():
        problem = _folder_problem(model)
        section.facts[model.id] = f"{model.kind}, {size(model.weights_bytes)}, {problem or 'complete'}"
        if problem and model.id == catalog.default and not settings.modelless:
            hint = "scripts/fetch_model fetches the default model; MODEL_PATH names another folder"
            section.problems.append(f"the default model {model.id} cannot be served: {problem}. {hint}")
    section.facts["default"] = catalog.default
    return section, catalog


def _folder_problem(model: CatalogModel) -> str:
    try:
        check_folder(model.path)
    except ModelError as error:
        return str(error)
    return ""


def smallest_text_model(catalog: Catalog) -> CatalogModel | None:
    """Return the complete text model with the smallest weights; None if there is none that fits into free memory."""
    free = psutil.virtual_memory().available * _MODEL_SHARE
    usable = [model for model in catalog.models.values() if model.kind == "text" and not _folder_problem(model)]
    fitting = [model for model in usable if model.weights_bytes < free]
    return min(fitting, key=lambda model: model.weights_bytes, default=None)
