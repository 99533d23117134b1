"""The models that this service may serve: `models/catalog.toml`, or the one of MODEL_PATH alone.

Whoever makes a mistake in the file is told by line, and the other entries serve.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from shared.models.catalog_text import CatalogText
from shared.models.facts import fetched_otherwise, told_context, weights_bytes
from shared.models.folder import ModelError, check_adapter, check_folder, model_kind
from shared.settings import ROOT, Settings

_NAME: Final = r"^[A-Za-z0-9][\w.-]{0,127}$"
"""What a model may be called: it is part of a queue's name and of keys."""
_HUB_ID: Final = r"^[\w.-]+/[\w.-]+$"


class SamplingDefaults(BaseModel):
    """What a request gets that does not say. The names are those of requests."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)


class _Entry(BaseModel):
    """A table of the file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    path: str | None = Field(None, min_length=1)
    hub: str | None = Field(None, pattern=_HUB_ID)
    revision: str | None = Field(None, min_length=1)
    kind: Literal["text", "vision"] | None = None
    context: int | None = Field(None, ge=16)
    slots: int | None = Field(None, ge=1, le=1024)
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    quantize_bits: Literal[2, 3, 4, 5, 6, 8] | None = None
    aliases: list[Annotated[str, Field(pattern=_NAME)]] = []
    adapter: str | None = Field(None, min_length=1)
    sampling: SamplingDefaults = SamplingDefaults()
    pin: bool = False


@dataclass(frozen=True, slots=True)
class CatalogModel:
    """A model that may be served.

    Attributes:
        context: most tokens of prompt and answer, where that is to be less than the model allows.
        slots: rows decoded at once; None: SLOTS.
        dtype, quantize_bits: what its weights become when they are loaded; None: as they are.
        adapter: a folder of LoRA weights.
        pin: whether it is never unloaded to make place for another.
        told_context: most tokens by its own files; None: they do not say.
        weights_bytes: what `measure` said when the catalog was read.
    """

    id: str
    path: Path
    kind: str
    context: int | None = None
    slots: int | None = None
    dtype: str | None = None
    quantize_bits: int | None = None
    aliases: tuple[str, ...] = ()
    adapter: Path | None = None
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)
    pin: bool = False
    told_context: int | None = None
    weights_bytes: int = 0

    def measure(self) -> int:
        """About the bytes that its weights take in memory, by its folder as it is now; 0: it holds no model."""
        adapter = weights_bytes(self.adapter) if self.adapter else 0
        return weights_bytes(self.path, self.dtype, self.quantize_bits) + adapter

    @property
    def told_kind(self) -> str | None:
        """Its kind by its own files; None: they are not here, but perhaps where a worker is."""
        return self.kind if self.weights_bytes else None

    @property
    def most_tokens(self) -> int | None:
        """Of prompt and answer together, as far as it is known without loading it."""
        return min((each for each in (self.context, self.told_context) if each is not None), default=None)


@dataclass(frozen=True, slots=True)
class Catalog:
    """All of them.

    Attributes:
        default: id of the one that a request gets which names none.
        faults: a line for each entry that is wrong.
    """

    models: dict[str, CatalogModel]
    default: str
    faults: tuple[str, ...] = ()

    def resolve(self, name: str | None) -> CatalogModel | None:
        """The model that an id or an alias means; None when there is none."""
        asked = name or self.default
        if asked in self.models:
            return self.models[asked]
        return next((model for model in self.models.values() if asked in model.aliases), None)

    def first(self, worker_models: str, index: int) -> tuple[list[CatalogModel], list[str]]:
        """The models that a worker loads at its start by WORKER_MODELS, and names there that mean none.

        Args:
            index: which of the service's workers it is, from 0.
        """
        lists = worker_models.split(";")
        names = [name.strip() for name in lists[index % len(lists)].split(",") if name.strip()] or [self.default]
        found = [(name, self.resolve(name)) for name in names]
        models = list({model.id: model for _, model in found if model is not None}.values())
        return models, [name for name, model in found if model is None]


def load_catalog(settings: Settings) -> Catalog:
    """Read the catalog. A MODEL_PATH that somebody has set is the default, whatever the file says."""
    path = settings.model_path
    own = _told(CatalogModel(path.name, path, model_kind(path)))
    if not settings.models_file.exists():
        wanted = "models_file" in settings.model_fields_set
        return Catalog({own.id: own}, own.id, (f"MODELS_FILE: there is no {settings.models_file}",) * wanted)
    reader = _Reader(settings)
    models = {model.id: model for model in reader.models()}
    if "model_path" in settings.model_fields_set or not models:
        same = [model for model in models.values() if model.path.resolve() == own.path.resolve()]
        known = min(same, key=lambda model: model.id != own.id, default=None)
        if known is None and own.id in models:
            reader.fault(own.id, "path", f"[models.{own.id}] has the name of MODEL_PATH's model, which is another")
        default = known or own
        models[default.id] = default
    else:
        default = models.get(reader.default or "") or next(iter(models.values()))
        if reader.default not in (None, default.id):
            reader.fault("", "default", f"there is no model {reader.default} that can be served")
    return Catalog(models, default.id, tuple(told for _, told in sorted(reader.faults)))


class _Reader:
    """Reads the file, and notes what is wrong with it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.faults: list[tuple[int, str]] = []
        self.default: str | None = None
        try:
            text = settings.models_file.read_text("utf-8", errors="replace")
        except OSError as error:
            text = ""
            self._note(1, f"it cannot be read: {error.strerror}")
        self._text = CatalogText(text)
        for line, what in self._text.faults:
            self._note(line, what)

    def models(self) -> Iterator[CatalogModel]:
        """Those that are right."""
        content = self._text.content
        for key in content.keys() - {"models", "default"}:
            self.fault("", key, f"{key} is unknown; a file has `default` and tables [models.NAME]")
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

    def fault(self, name: str, key: str, what: str) -> None:
        """Note one of an entry, at the line of a key; or of the file itself."""
        self._note(self._text.line(*(("models", name) if name else ()), key), what)

    def _model(self, name: str, table: Any) -> CatalogModel | None:
        if not re.fullmatch(_NAME, name):
            self.fault(name, "", f"[models.{name}]: a name has letters, digits and . _ - only")
            return None
        try:
            entry = _Entry.model_validate(table)
        except ValidationError as error:
            for each in error.errors():
                self._refuse(name, [str(part) for part in each["loc"]], _said(name, each))
            return None
        return self._checked(name, entry)

    def _refuse(self, name: str, place: list[str], what: str) -> None:
        """Note what is wrong at a place of an entry, which may be in a table of it."""
        where = " ".join(part for part in (f"[models.{name}]", ".".join(place)) if part)
        self._note(self._text.line("models", name, *place), f"{where}: {what}")

    def _checked(self, name: str, entry: _Entry) -> CatalogModel | None:
        """The entry as a model, if its folders are what it says."""
        path = _placed(entry.path or f"models/{(entry.hub or name).rpartition('/')[2]}")
        adapter = _placed(entry.adapter) if entry.adapter else None
        there = _is_there(path)
        kind = model_kind(path) if there else entry.kind or "text"
        key, what = self._wrong_on_disk(entry, path, adapter) if there else _absent(entry, path)
        if what:
            self.fault(name, key, f"[models.{name}]{f' {key}' if there else ''}: {what}")
            # Who names no model means this one, and no other: it may be fetched yet, and nothing serves until then.
            if there or name != self.default:
                return None
        model = CatalogModel(
            id=name,
            path=path,
            kind=kind,
            context=entry.context,
            slots=entry.slots,
            dtype=entry.dtype,
            quantize_bits=entry.quantize_bits,
            aliases=tuple(entry.aliases),
            adapter=adapter,
            sampling=entry.sampling,
            pin=entry.pin,
        )
        return _told(model)

    def _wrong_on_disk(self, entry: _Entry, path: Path, adapter: Path | None) -> tuple[str, str]:
        """The key that is at fault, and why; both empty when all is well."""
        kind = model_kind(path)
        if entry.kind not in (None, kind):
            return "kind", f"the folder holds a {kind} model"
        if adapter is not None and kind == "vision":
            return "adapter", "adapters are for text models"
        if self._settings.backend == "fake":
            return "", ""
        if entry.hub and (other := fetched_otherwise(path, entry.hub, entry.revision)):
            key = "revision" if other.startswith("revision ") else "hub"
            return key, f"{path} holds {other}; {_how_to_fetch(entry, path)}"
        if why := _refusal(check_folder, path):
            return "path" if entry.path else "hub", why
        return "adapter", _refusal(check_adapter, adapter) if adapter else ""

    def _names_are_free(self, model: CatalogModel, taken: dict[str, str]) -> bool:
        for alias in model.aliases:
            if alias in taken:
                of = taken[alias] or alias
                self.fault(model.id, "aliases", f"[models.{model.id}] aliases: {alias} is {of}'s already")
                return False
        taken.update(dict.fromkeys(model.aliases, model.id))
        return True

    def _note(self, line: int, what: str) -> None:
        path = self._settings.models_file
        shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name
        self.faults.append((line, f"{shown}:{line}: {what}"))


def _said(name: str, error: ErrorDetails) -> str:
    """What is wrong with a value, in the words of the file's format."""
    if error["type"] == "extra_forbidden" and len(error["loc"]) == 1:
        if isinstance(error["input"], dict):
            return f'there is no such table; a name with dots stands in quotes: [models."{name}.{error["loc"][0]}"]'
        return f"there is no such key; there are {', '.join(_Entry.model_fields)}"
    if error["type"] == "extra_forbidden" and error["loc"][0] == "sampling":
        return f"there is no such key; there are {', '.join(SamplingDefaults.model_fields)}"
    if not error["loc"]:
        return "it must be a table"
    return error["msg"]


def _told(model: CatalogModel) -> CatalogModel:
    """With what its files tell before it is loaded."""
    return replace(model, told_context=told_context(model.path), weights_bytes=model.measure())


def _absent(entry: _Entry, path: Path) -> tuple[str, str]:
    """That a model is not there, and how to get it."""
    what = f"there is no model in {path}"
    if entry.hub is None:
        return "path", what
    return "path" if entry.path else "hub", f"{what}; {_how_to_fetch(entry, path)}"


def _how_to_fetch(entry: _Entry, path: Path) -> str:
    revision = f" --revision {entry.revision}" if entry.revision else ""
    place = f" -o {path.parent} --name {path.name}" if entry.path else ""
    return f"scripts/fetch_model {entry.hub}{revision}{place} gets it"


def _placed(path: str) -> Path:
    """A path of the file: those that are relative are meant from the repository."""
    try:
        return ROOT / Path(path).expanduser()
    except RuntimeError:  # nobody here is called so
        return ROOT / path


def _is_there(path: Path) -> bool:
    """Whether a folder has a model, as far as we may look."""
    try:
        return (path / "config.json").is_file()
    except OSError:
        return False


def _refusal(check: Callable[[Path], None], folder: Path) -> str:
    """Why a folder cannot be used; empty when it can."""
    try:
        check(folder)
    except ModelError as error:
        return str(error)
    except OSError as error:
        return f"{folder} cannot be read: {error.strerror}"
    return ""
