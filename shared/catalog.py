"""The models that this service may serve: `models/catalog.toml`, or the one of MODEL_PATH alone.

Whoever makes a mistake in the file is told by line, and the other entries serve.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shared.model_folder import model_kind
from shared.settings import ROOT, Settings

_NAME: Final = r"^[A-Za-z0-9][\w.-]{0,127}$"
"""What a model may be called: it is part of a queue's name and of keys."""
_HUB_ID: Final = r"^[\w.-]+/[\w.-]+$"


class Sampling(BaseModel):
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
    sampling: Sampling = Sampling()
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
    sampling: Sampling = field(default_factory=Sampling)
    pin: bool = False


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


def load_catalog(settings: Settings) -> Catalog:
    """Read the catalog. A MODEL_PATH that somebody has set is the default, whatever the file says."""
    own = CatalogModel(settings.model_path.name, settings.model_path, model_kind(settings.model_path))
    alone = Catalog({own.id: own}, own.id)
    if not settings.models_file.is_file():
        return alone
    text = settings.models_file.read_text("utf-8", errors="replace")
    reader = _Reader(settings.models_file, text)
    models = {model.id: model for model in reader.models()}
    default = reader.default
    if "model_path" in settings.model_fields_set or not models:
        known = next((model for model in models.values() if model.path == own.path), None)
        default = (known or own).id
        models.setdefault(default, own)
    elif default not in models:
        if default is not None:
            reader.fault("default", "", f"there is no model {default} that can be served")
        default = next(iter(models))
    return Catalog(models, default, tuple(reader.faults))


class _Reader:
    """Reads a file, and notes what is wrong with it."""

    def __init__(self, path: Path, text: str) -> None:
        self._path = path
        self._lines = text.splitlines()
        self.faults: list[str] = []
        self.default: str | None = None
        try:
            self._content = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            found = re.search(r"\(at line (\d+)", str(error))
            self._note(int(found[1]) if found else 1, f"not TOML: {str(error).split(' (at ')[0]}")
            self._content = {}

    def models(self) -> Iterator[CatalogModel]:
        """Those that are right."""
        for key in self._content.keys() - {"models", "default"}:
            self.fault(key, "", f"{key} is unknown; a file has `default` and tables [models.NAME]")
        default, tables = self._content.get("default"), self._content.get("models", {})
        if isinstance(default, str):
            self.default = default
        elif default is not None:
            self.fault("default", "", "default must be a model's id")
        if not isinstance(tables, dict):
            self.fault("models", "", "models must be tables [models.NAME]")
            return
        taken: dict[str, str] = dict.fromkeys(tables, "")
        for name, table in tables.items():
            model = self._model(name, table)
            if model is not None and self._names_are_free(model, taken):
                yield model

    def fault(self, key: str, table: str, what: str) -> None:
        """Note one, at the line of a key."""
        self._note(self._line(key, table), what)

    def _model(self, name: str, table: Any) -> CatalogModel | None:
        if not re.fullmatch(_NAME, name):
            self.fault("", name, f"[models.{name}]: a name has letters, digits and . _ - only")
            return None
        try:
            entry = _Entry.model_validate(table)
        except ValidationError as error:
            for each in error.errors():
                place = [str(part) for part in each["loc"]]
                inner = self._line(place[-1], f"{name}.{place[0]}") if len(place) > 1 else 1
                line = inner if inner > 1 else self._line(place[0] if place else "", name)
                self._note(line, f"[models.{name}] {'.'.join(place)}: {each['msg']}")
            return None
        return self._checked(name, entry)

    def _checked(self, name: str, entry: _Entry) -> CatalogModel | None:
        """What only the disk can tell."""
        path = _placed(entry.path or f"models/{(entry.hub or name).rpartition('/')[2]}")
        if not (path / "config.json").is_file():
            self.fault(
                "path" if entry.path else "hub", name, f"[models.{name}]: there is no model in {path}{_hint(entry)}"
            )
            return None
        kind = model_kind(path)
        if entry.kind is not None and entry.kind != kind:
            self.fault("kind", name, f"[models.{name}] kind: the folder holds a {kind} model")
            return None
        adapter = _placed(entry.adapter) if entry.adapter else None
        if adapter is not None and not (adapter / "adapter_config.json").is_file():
            self.fault("adapter", name, f"[models.{name}] adapter: there is no adapter_config.json in {adapter}")
            return None
        return CatalogModel(
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

    def _names_are_free(self, model: CatalogModel, taken: dict[str, str]) -> bool:
        for alias in model.aliases:
            if alias in taken:
                of = taken[alias] or alias
                self.fault("aliases", model.id, f"[models.{model.id}] aliases: {alias} is {of}'s already")
                return False
        taken.update(dict.fromkeys(model.aliases, model.id))
        return True

    def _note(self, line: int, what: str) -> None:
        self.faults.append(f"{self._path.name}:{line}: {what}")

    def _line(self, key: str, table: str) -> int:
        """The line of a key of a table, or of the table, counted from 1."""
        quoted = re.escape(table)
        header = re.compile(rf"\s*\[\s*models\s*\.\s*(?:{quoted}|\"{quoted}\"|'{quoted}')\s*[.\]]")
        start = next((i for i, line in enumerate(self._lines) if table and header.match(line)), -1)
        for number, line in enumerate(self._lines[start + 1 :], start + 2):
            if table and re.match(r"\s*\[", line):
                break
            if key and re.match(rf"\s*\"?{re.escape(key)}\"?\s*[=.]", line):
                return number
        return max(start + 1, 1)


def _hint(entry: _Entry) -> str:
    """How to get a model that is not there."""
    if entry.hub is None:
        return ""
    return f"; scripts/fetch_model {entry.hub}{f' --revision {entry.revision}' if entry.revision else ''} gets it"


def _placed(path: str) -> Path:
    """A path of the file: those that are relative are meant from the repository."""
    return ROOT / Path(path).expanduser()
