"""The catalog of models that the service may serve: `models/catalog.toml`, or only the model of MODEL_PATH.

Mistakes in the file are reported with their line, and all other entries can be served.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from shared.models.adapters import ADAPTER_NAME, adapter_folders
from shared.models.catalog_text import CatalogText
from shared.models.facts import declared_context, modified_at, other_source, weights_bytes
from shared.models.folder import INPUT_KINDS, ModelError, check_adapter, check_folder, has_vision, model_kind
from shared.models.sampling_defaults import SamplingDefaults
from shared.settings import ROOT, Settings

MODEL_NAME: Final = r"^[A-Za-z0-9][\w.-]{0,127}$"
"""Allowed model names, which become part of Redis keys."""
HUB_ID: Final = r"^[\w.-]+/[\w.-]+$"


class _Entry(BaseModel):
    """A table [models.NAME] of the file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    path: str | None = Field(None, min_length=1)
    hub: str | None = Field(None, pattern=HUB_ID)
    revision: str | None = Field(None, min_length=1)
    kind: Literal["text", "vision", "embedding", "rerank"] | None = None
    context: int | None = Field(None, ge=16)
    slots: int | None = Field(None, ge=1, le=1024)
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    quantize_bits: Literal[2, 3, 4, 5, 6, 8] | None = None
    kv_bits: Literal[4, 8] | None = None
    draft_model: str | None = Field(None, min_length=1)
    aliases: list[Annotated[str, Field(pattern=MODEL_NAME)]] = []
    adapter: str | None = Field(None, min_length=1)
    adapters: dict[Annotated[str, Field(pattern=ADAPTER_NAME)], Annotated[str, Field(min_length=1)]] = {}
    adapters_folder: str | None = Field(None, min_length=1)
    sampling: SamplingDefaults = SamplingDefaults()
    chat_template_kwargs: dict[Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")], Any] = {}
    pin: bool = False


@dataclass(frozen=True, slots=True)
class CatalogModel:
    """A model that may be served.

    Attributes:
        context: maximum tokens of prompt and answer, in place of what the model's files declare.
        slots: maximum rows in a batch; None for the setting SLOTS.
        dtype, quantize_bits: conversion of the weights when they are loaded; None for no conversion.
        kv_bits: bits per number of cached keys and values; None: those of the model's type.
        adapter: a folder with LoRA weights that are part of the model.
        adapters: folders with LoRA weights that requests can name.
        draft: folder of a small model that drafts tokens for this one.
        chat_template_kwargs: variables of the chat template, unless a request sets them.
        pin: whether it is never unloaded to free memory for another model.
        declared_context: context declared by the model's files; None if they declare none.
        declared_sampling: sampling parameters declared by the model's files.
        weights_bytes: result of `measure` when the catalog was read.
        modified_at: when its config.json was written, in seconds since the epoch; None if it is not on this host.
        text_only: whether the folder also has an image encoder, which is not used.
    """

    id: str
    path: Path
    kind: str
    context: int | None = None
    slots: int | None = None
    dtype: str | None = None
    quantize_bits: int | None = None
    kv_bits: int | None = None
    aliases: tuple[str, ...] = ()
    adapter: Path | None = None
    adapters: dict[str, Path] = field(default_factory=dict)
    draft: Path | None = None
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    pin: bool = False
    declared_context: int | None = None
    declared_sampling: SamplingDefaults = field(default_factory=SamplingDefaults)
    weights_bytes: int = 0
    modified_at: float | None = None
    text_only: bool = False

    def measure(self) -> int:
        """Estimate the bytes of its weights in memory from the current files; 0 if the folder holds no model."""
        more = sum(weights_bytes(folder) for folder in (self.adapter, self.draft) if folder)
        return weights_bytes(self.path, self.dtype, self.quantize_bits) + more

    @property
    def declared_kind(self) -> str | None:
        """The kind by the model's files; None if they are not on this host. They may still be on a worker's host."""
        return self.kind if self.weights_bytes else None

    @property
    def context_limit(self) -> int | None:
        """Maximum tokens of prompt and answer together, if it is known without loading the model."""
        return self.context or self.declared_context


@dataclass(slots=True)
class Catalog:
    """All models that may be served, by id. Models and aliases may be added while the service runs.

    Attributes:
        default: id of the model for requests that name none.
        faults: one line for each mistake in the file.
    """

    models: dict[str, CatalogModel]
    default: str
    faults: tuple[str, ...] = ()

    def resolve(self, name: str | None) -> CatalogModel | None:
        """Return the model with an id or an alias, by default the default model; None if there is none."""
        name = name or self.default
        if name in self.models:
            return self.models[name]
        return next((model for model in self.models.values() if name in model.aliases), None)

    def replace_with(self, other: Catalog) -> None:
        """Take over the content of another catalog. Running iterations over `models` continue with the former ones."""
        self.models, self.default, self.faults = other.models, other.default, other.faults

    def resolve_adapter(self, name: str | None) -> tuple[CatalogModel | None, str | None]:
        """Return the model and the adapter of a name of the form `model` or `model:adapter`."""
        model = self.resolve(name)
        if model is None and name and ":" in name:
            base, _, adapter = name.rpartition(":")
            model = self.resolve(base) if base else None
            return model, adapter if model else None
        return model, None

    def first(self, worker_models: str, index: int) -> tuple[list[CatalogModel], list[str]]:
        """Return the models that a worker loads at startup.

        Args:
            worker_models: the setting WORKER_MODELS.
            index: number of the worker process on this host, from 0.

        Returns:
            The models, and the names in the setting that no model has.
        """
        lists = worker_models.split(";")
        names = [name.strip() for name in lists[index % len(lists)].split(",") if name.strip()] or [self.default]
        resolved = {name: self.resolve(name) for name in names}
        models = {model.id: model for model in resolved.values() if model is not None}
        return list(models.values()), [name for name, model in resolved.items() if model is None]


def load_catalog(settings: Settings) -> Catalog:
    """Read the catalog. If MODEL_PATH is set explicitly, its model is the default, whatever the file says."""
    path = settings.model_path
    own = with_declared(CatalogModel(path.name, path, model_kind(path)))
    if not settings.models_file.exists():
        is_set = "models_file" in settings.model_fields_set
        return Catalog({own.id: own}, own.id, (f"MODELS_FILE: {settings.models_file} does not exist",) * is_set)
    reader = _Reader(settings)
    models = {model.id: model for model in reader.models()}
    if "model_path" in settings.model_fields_set or not models:
        same = [model for model in models.values() if model.path.resolve() == own.path.resolve()]
        known = min(same, key=lambda model: model.id != own.id, default=None)
        if known is None and own.id in models:
            reader.fault(
                own.id,
                "path",
                f"[models.{own.id}] has the same name as the model of MODEL_PATH but another path; rename it",
            )
        default = known or own
        models[default.id] = default
    else:
        default = models.get(reader.default or "") or next(iter(models.values()))
        if reader.default not in (None, default.id):
            reader.fault("", "default", f"default: the model {reader.default} does not exist or cannot be served")
    return Catalog(models, default.id, tuple(text for _, text in sorted(reader.faults)))


class _Reader:
    """Parses the file and collects its mistakes as (line, text)."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.faults: list[tuple[int, str]] = []
        self.default: str | None = None
        try:
            text = settings.models_file.read_text("utf-8", errors="replace")
        except OSError as error:
            text = ""
            self._note(1, f"the file cannot be read: {error.strerror}")
        self._text = CatalogText(text)
        for line, problem in self._text.faults:
            self._note(line, problem)

    def models(self) -> Iterator[CatalogModel]:
        """Yield the models without mistakes."""
        content = self._text.content
        for key in content.keys() - {"models", "default"}:
            self.fault("", key, f"{key} is unknown; supported are `default` and tables [models.NAME]")
        default, tables = content.get("default"), content.get("models", {})
        if isinstance(default, str) and default:
            self.default = default
        elif default is not None:
            self.fault("", "default", "default must be a model's id")
        if not isinstance(tables, dict):
            self.fault("", "models", "models must be tables [models.NAME]")
            return
        taken: dict[str, str] = dict.fromkeys(tables, "")
        for name, table in tables.items():
            model = self._model(name, table)
            if model is not None and self._names_are_free(model, taken):
                yield model

    def fault(self, name: str, key: str, problem: str) -> None:
        """Record a mistake at the line of a key, in the entry `name` or, if that is empty, at the top level."""
        self._note(self._text.line(*(("models", name) if name else ()), key), problem)

    def _model(self, name: str, table: Any) -> CatalogModel | None:
        if not re.fullmatch(MODEL_NAME, name):
            self.fault(name, "", f"[models.{name}]: a name must consist of letters, digits and . _ -")
            return None
        try:
            entry = _Entry.model_validate(table)
        except ValidationError as error:
            for details in error.errors():
                self._invalid_value(name, [str(part) for part in details["loc"]], _describe(name, details))
            return None
        return self._checked(name, entry)

    def _invalid_value(self, name: str, path: list[str], problem: str) -> None:
        """Record a mistake at a key of an entry; `path` is the key, or a table of the entry and a key in it."""
        where = " ".join(part for part in (f"[models.{name}]", ".".join(path)) if part)
        self._note(self._text.line("models", name, *path), f"{where}: {problem}")

    def _checked(self, name: str, entry: _Entry) -> CatalogModel | None:
        """Convert an entry to a model after checking its folders; None if there is a mistake."""
        path = _resolve_path(entry.path or f"models/{(entry.hub or name).rpartition('/')[2]}")
        adapter = _resolve_path(entry.adapter) if entry.adapter else None
        draft = _resolve_path(entry.draft_model) if entry.draft_model else None
        exists = _is_model(path)
        kind = _kind(entry, path) if exists else entry.kind or "text"
        key, problem = self._check_folders(entry, path, kind, adapter) if exists else _missing(entry, path)
        if problem:
            self.fault(name, key, f"[models.{name}]{f' {key}' if exists else ''}: {problem}")
            # A missing default model stays the default: it may still be fetched, and no other model must replace it.
            if exists or name != self.default:
                return None
        model = CatalogModel(
            id=name,
            path=path,
            kind=kind,
            context=entry.context,
            slots=entry.slots,
            dtype=entry.dtype,
            quantize_bits=entry.quantize_bits,
            kv_bits=entry.kv_bits,
            aliases=tuple(entry.aliases),
            adapter=adapter,
            adapters=self._adapters(name, entry),
            draft=draft,
            sampling=entry.sampling,
            chat_template_kwargs=entry.chat_template_kwargs,
            pin=entry.pin,
        )
        return with_declared(model)

    def _adapters(self, name: str, entry: _Entry) -> dict[str, Path]:
        """Return the adapters that requests can name. Without one that is missing, the others can still be used."""
        adapters = {each: _resolve_path(folder) for each, folder in sorted(entry.adapters.items())}
        if entry.adapters_folder:
            adapters = adapter_folders(_resolve_path(entry.adapters_folder)) | adapters
        for adapter, folder in adapters.items():
            if not self._settings.modelless and not folder.is_dir():
                self._invalid_value(name, ["adapters", adapter], f"{folder} is not a folder")
        return adapters

    def _check_folders(self, entry: _Entry, path: Path, kind: str, adapter: Path | None) -> tuple[str, str]:
        """Return the key with a mistake and a description; both are empty if there is none."""
        if entry.kind not in (None, kind):
            unsupported = f"the images of {path} are not supported; it serves only text"
            return "kind", unsupported if has_vision(path) else f"{path} holds a {kind} model"
        if option := _unsupported_option(entry, kind):
            return option
        if self._settings.modelless:
            return "", ""
        if entry.hub and (other := other_source(path, entry.hub, entry.revision)):
            key = "revision" if other.startswith("revision ") else "hub"
            return key, f"{path} holds {other}; {_fetch_hint(entry, path)}"
        if problem := _problem(lambda folder: check_folder(folder, kind), path):
            return "path" if entry.path else "hub", problem
        if entry.draft_model and (problem := _problem(check_folder, _resolve_path(entry.draft_model))):
            return "draft_model", problem
        return "adapter", _problem(check_adapter, adapter) if adapter else ""

    def _names_are_free(self, model: CatalogModel, taken: dict[str, str]) -> bool:
        for alias in model.aliases:
            if alias in taken:
                owner = taken[alias] or alias
                self.fault(model.id, "aliases", f"[models.{model.id}] aliases: {alias} already belongs to {owner}")
                return False
        taken.update(dict.fromkeys(model.aliases, model.id))
        return True

    def _note(self, line: int, text: str) -> None:
        path = self._settings.models_file
        file = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name
        self.faults.append((line, f"{file}:{line}: {text}"))


def _describe(name: str, error: ErrorDetails) -> str:
    """Describe a validation error in terms of the file."""
    if error["type"] == "extra_forbidden" and len(error["loc"]) == 1:
        if isinstance(error["input"], dict):
            return f'unknown table; quote a name that contains dots: [models."{name}.{error["loc"][0]}"]'
        return f"unknown key; supported are {', '.join(_Entry.model_fields)}"
    if error["type"] == "extra_forbidden" and error["loc"][0] == "sampling":
        return f"unknown key; supported are {', '.join(SamplingDefaults.model_fields)}"
    if not error["loc"]:
        return "must be a table"
    return error["msg"]


def _kind(entry: _Entry, path: Path) -> str:
    """Return the kind of a folder's model. Its files decide about images, the entry decides what a decoder is for."""
    return model_kind(path) if entry.kind is None or entry.kind == "vision" else entry.kind


def _unsupported_option(entry: _Entry, kind: str) -> tuple[str, str] | None:
    """Return an option that a model of this kind does not have, and a description; None if there is none."""
    for key in ("adapter", "adapters", "adapters_folder", "draft_model", "kv_bits"):
        if kind in INPUT_KINDS and getattr(entry, key) not in (None, {}):
            return key, f"a model of the kind {kind!r} has no such option"
    return None


def with_declared(model: CatalogModel) -> CatalogModel:
    """Add the properties that the model's files declare."""
    return replace(
        model,
        declared_context=declared_context(model.path),
        declared_sampling=SamplingDefaults.declared(model.path),
        weights_bytes=model.measure(),
        modified_at=modified_at(model.path),
        text_only=model.kind == "text" and has_vision(model.path),
    )


def _missing(entry: _Entry, path: Path) -> tuple[str, str]:
    """Return the key and the description of a missing model, with the command that fetches it."""
    text = f"there is no model in {path}"
    if entry.hub is None:
        return "path", text
    return "path" if entry.path else "hub", f"{text}; {_fetch_hint(entry, path)}"


def _fetch_hint(entry: _Entry, path: Path) -> str:
    revision = f" --revision {entry.revision}" if entry.revision else ""
    target = f" -o {path.parent} --name {path.name}" if entry.path else ""
    return f"to fetch it, run scripts/fetch_model {entry.hub}{revision}{target}"


def _resolve_path(path: str) -> Path:
    """Resolve a path in the file. Relative paths are relative to the repository."""
    try:
        return ROOT / Path(path).expanduser()
    except RuntimeError:  # unknown user in ~user
        return ROOT / path


def _is_model(path: Path) -> bool:
    """Whether a folder holds a model; False also if it cannot be read."""
    try:
        return (path / "config.json").is_file()
    except OSError:
        return False


def _problem(check: Callable[[Path], None], folder: Path) -> str:
    """Return why a folder cannot be used; an empty string if it can."""
    try:
        check(folder)
    except ModelError as error:
        return str(error)
    except OSError as error:
        return f"{folder} cannot be read: {error.strerror}"
    return ""
