"""The catalog of models, and how its mistakes are told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shared.catalog import Catalog, load_catalog
from shared.settings import Settings


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for name in ("one", "two", "seer"):
        (tmp_path / name).mkdir()
        config = {"model_type": "llama"} | ({"vision_config": {"depth": 2}} if name == "seer" else {})
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    return tmp_path


def read(models: Path, text: str, **settings: object) -> Catalog:
    (models / "catalog.toml").write_text(text.replace("HERE", str(models)))
    return load_catalog(Settings(models_file=models / "catalog.toml", **settings))  # type: ignore[arg-type]


def test_without_a_file_the_model_of_the_settings_is_all(models: Path) -> None:
    catalog = load_catalog(Settings(models_file=models / "none.toml", model_path=models / "seer"))
    assert list(catalog.models) == ["seer"] == [catalog.default]
    assert catalog.models["seer"].kind == "vision"


def test_entries_with_all_they_can_say(models: Path) -> None:
    (models / "lora").mkdir()
    (models / "lora/adapter_config.json").write_text("{}")
    catalog = read(
        models,
        """
default = "two"
[models.one]
path = "HERE/one"
[models.two]
path = "HERE/two"
kind = "text"
context = 4096
slots = 8
dtype = "float16"
quantize_bits = 4
aliases = ["small", "deux"]
adapter = "HERE/lora"
pin = true
[models.two.sampling]
temperature = 0.3
max_tokens = 100
[models."seer.v1"]
path = "HERE/seer"
""",
    )
    assert catalog.faults == ()
    assert list(catalog.models) == ["one", "two", "seer.v1"]
    two = catalog.resolve(None)
    assert two is not None
    assert two is catalog.resolve("deux") is catalog.resolve("two")
    assert (two.context, two.slots, two.dtype, two.quantize_bits, two.pin) == (4096, 8, "float16", 4, True)
    assert (two.sampling.temperature, two.sampling.max_tokens, two.sampling.top_p) == (0.3, 100, None)
    assert two.adapter == models / "lora"
    assert catalog.resolve("three") is None


@pytest.mark.parametrize(
    ("entry", "line", "what"),
    [
        ('path = "HERE/two"\nslots = 0', 5, "[models.two] slots: Input should be greater than or equal to 1"),
        ('path = "HERE/two"\nslot = 1', 5, "[models.two] slot: Extra inputs are not permitted"),
        ('path = "HERE/nowhere"', 4, "[models.two]: there is no model in HERE/nowhere"),
        (
            'hub = "org/nowhere"\nrevision = "v2"', 4,
            "scripts/fetch_model org/nowhere --revision v2 gets it",
        ),
        ('path = "HERE/two"\nkind = "vision"', 5, "[models.two] kind: the folder holds a text model"),
        ('path = "HERE/two"\nadapter = "HERE/one"', 5, "[models.two] adapter: there is no adapter_config.json"),
        ('path = "HERE/two"\naliases = ["one"]', 5, "[models.two] aliases: one is one's already"),
        ('path = "HERE/two"\n\n# more\nsampling = { temperature = 9 }', 7, "[models.two] sampling.temperature"),
        ('path = "HERE/two"\n[models.two.sampling]\ntop_p = 7.5', 6, "[models.two] sampling.top_p"),
        ('path = "HERE/two"\ndtype = "int3"', 5, "[models.two] dtype: Input should be"),
    ],
)  # fmt: skip
def test_a_wrong_entry_is_named_by_line_and_the_others_serve(models: Path, entry: str, line: int, what: str) -> None:
    catalog = read(
        models, f'[models.one]\npath = "HERE/one"\n[models.two]\n{entry}\n[models.seer]\npath = "HERE/seer"\n'
    )
    assert list(catalog.models) == ["one", "seer"]
    (fault,) = catalog.faults
    assert fault.startswith(f"catalog.toml:{line}: ")
    assert what.replace("HERE", str(models)) in fault


def test_what_is_wrong_with_the_file_itself(models: Path) -> None:
    catalog = read(models, '[models.one]\npath = "HERE/one\n', model_path=models / "two")
    assert list(catalog.models) == ["two"]
    assert catalog.faults[0].startswith("catalog.toml:2: not TOML")
    catalog = read(models, 'defaults = 1\ndefault = "three"\n[models.one]\npath = "HERE/one"\n["models"."a b"]\n')
    assert catalog.default == "one"
    assert [fault.split(": ")[0] for fault in catalog.faults][:1] == ["catalog.toml:1"]
    assert any("there is no model three" in fault and ":2: " in fault for fault in catalog.faults)
    assert any("[models.a b]" in fault for fault in catalog.faults)


def test_a_model_that_is_set_is_the_default_and_keeps_its_entry(models: Path) -> None:
    text = 'default = "first"\n[models.first]\npath = "HERE/one"\n[models.second]\npath = "HERE/two"\n'
    catalog = read(models, text, model_path=models / "two")
    assert (catalog.default, list(catalog.models)) == ("second", ["first", "second"])
    catalog = read(models, text, model_path=models / "seer")
    assert (catalog.default, list(catalog.models)) == ("seer", ["first", "second", "seer"])
    assert read(models, text).default == "first"


def test_the_file_that_comes_with_this_has_no_fault() -> None:
    catalog = load_catalog(Settings())
    assert catalog.faults == ()
