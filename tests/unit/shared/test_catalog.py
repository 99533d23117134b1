"""The catalog of models, and the reports of mistakes in it."""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scripts.model_files.manifest import Origin, write_manifest
from shared.models import catalog as catalog_module
from shared.models.catalog import Catalog, load_catalog
from shared.settings import ROOT, Settings
from tests.support.small_models import make_folder


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for name in ("one", "two"):
        make_folder(tmp_path / name)
    make_folder(tmp_path / "seer", "visual.weight")
    config = {"model_type": "qwen2_5_vl", "vision_config": {"depth": 2}}
    (tmp_path / "seer/config.json").write_text(json.dumps(config))
    (tmp_path / "seer/preprocessor_config.json").write_text("{}")
    return tmp_path


def read(models: Path, text: str, **settings: object) -> Catalog:
    (models / "catalog.toml").write_text(text.replace("HERE", str(models)))
    return load_catalog(Settings(models_file=models / "catalog.toml", **settings))  # type: ignore[arg-type]


def test_without_a_file_only_the_model_of_the_settings_is_served(models: Path) -> None:
    catalog = load_catalog(Settings(models_file=models / "none.toml", model_path=models / "seer"))
    assert list(catalog.models) == ["seer"] == [catalog.default]
    assert catalog.models["seer"].kind == "vision"


def test_entry_with_all_keys(models: Path) -> None:
    (models / "lora").mkdir()
    (models / "lora/adapter_config.json").write_text("{}")
    shutil.copy(models / "one/model.safetensors", models / "lora/adapters.safetensors")
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
kv_bits = 8
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
    assert (two.context, two.slots, two.dtype, two.quantize_bits, two.kv_bits, two.pin) == (
        4096,
        8,
        "float16",
        4,
        8,
        True,
    )
    assert (two.sampling.temperature, two.sampling.max_tokens, two.sampling.top_p) == (0.3, 100, None)
    assert two.adapter == models / "lora"
    assert catalog.resolve("three") is None


def test_adapters_are_named_one_by_one_or_by_their_folder(models: Path) -> None:
    for name in ("mail", "sql"):
        (models / "loras" / name).mkdir(parents=True)
        (models / "loras" / name / "adapter_config.json").write_text("{}")
    entry = '[models.one]\npath = "HERE/one"\n'
    catalog = read(models, entry + 'adapters_folder = "HERE/loras"\nadapters = { sql = "HERE/two" }\n')
    assert catalog.faults == ()
    assert catalog.models["one"].adapters == {"mail": models / "loras/mail", "sql": models / "two"}
    assert catalog.resolve_adapter("one:sql") == (catalog.models["one"], "sql")
    assert catalog.resolve_adapter("one") == (catalog.models["one"], None)
    assert catalog.resolve_adapter("two:sql") == catalog.resolve_adapter(":sql") == (None, None)


def test_a_missing_adapter_is_reported_and_the_model_is_served(models: Path) -> None:
    catalog = read(models, '[models.one]\npath = "HERE/one"\n[models.one.adapters]\nsql = "HERE/none"\n')
    (fault,) = catalog.faults
    assert fault.endswith(f"catalog.toml:4: [models.one] adapters.sql: {models}/none is not a folder")
    assert list(catalog.models["one"].adapters) == ["sql"], "a worker reports it as unusable"


def fetched(models: Path, source: str, requested: str) -> None:
    shutil.copytree(models / "one", models / "fetched")
    write_manifest(models / "fetched", Origin(source, "0123456789", requested))


@pytest.mark.parametrize(
    ("source", "requested", "revision"),
    [
        ("org/fetched", "v1", "v1"), ("org/fetched", "v1", "0123456789"), ("org/fetched", "v1", "0123456"),
        ("org/fetched", "", "main"), ("org/fetched", "v1", ""), ("/somewhere/else", "", "v1"),
    ],
)  # fmt: skip
def test_folder_fetched_at_the_named_revision_is_served(
    models: Path, source: str, requested: str, revision: str
) -> None:
    fetched(models, source, requested)
    named = f'revision = "{revision}"' if revision else ""
    catalog = read(models, f'[models.one]\nhub = "org/fetched"\npath = "HERE/fetched"\n{named}\n')
    assert catalog.faults == ()
    assert list(catalog.models) == ["one"]


@pytest.mark.parametrize(
    ("entry", "line", "message"),
    [
        ('path = "HERE/two"\nslots = 0', 5, "[models.two] slots: Input should be greater than or equal to 1"),
        ('path = "HERE/two"\nslot = 1', 5, "[models.two] slot: unknown key; supported are path, hub, revision, "),
        ('path = "HERE/nowhere"', 4, "[models.two]: there is no model in HERE/nowhere"),
        (
            'hub = "org/nowhere"\nrevision = "v2"', 4,
            f"no model in {ROOT}/models/nowhere; to fetch it, run scripts/fetch_model org/nowhere --revision v2",
        ),
        (
            'hub = "org/nowhere"\npath = "HERE/there"', 5,
            "no model in HERE/there; to fetch it, run scripts/fetch_model org/nowhere -o HERE --name there",
        ),
        ('path = "HERE/two"\nkind = "vision"', 5, "[models.two] kind: HERE/two holds a text model"),
        ('path = "HERE/two"\nadapter = "HERE/one"', 5, "[models.two] adapter: HERE/one has no adapter_config.json"),
        ('path = "~nobody-here/two"', 4, "[models.two]: there is no model in"),
        (f'path = "{"x" * 300}"', 4, "[models.two]: there is no model in"),
        ('path = "a\\u0000b"', 4, "[models.two]: there is no model in"),
        ('path = "HERE/cut"', 4, "[models.two] path: HERE/cut/model.safetensors has 165 of 166 bytes"),
        ('path = "HERE/two"\nkind = "text"\nkind = "text"', 6, "[models.two] is not TOML: Cannot overwrite a value"),
        ('path = "HERE/two', 4, "[models.two] is not TOML: Illegal character"),
        ('path = "HERE/two"\naliases = ["x",', 5, "[models.two] is not TOML: Invalid value"),
        ('path = "HERE/two"\n[models.two.sampling]\ntop_p = \n', 6, "[models.two] is not TOML: Invalid value"),
        ('path = "HERE/two"\n[models.two]\nslots = 4', 5, "[models.two] is not TOML: Cannot declare"),
        ('path = "HERE/two"\n[models.\'two\'.sampling]\ntop_p = 7.5', 6, "[models.two] sampling.top_p: Input"),
        ('path = "HERE/two"\naliases = ["one"]', 5, "[models.two] aliases: one already belongs to one"),
        ('path = "HERE/two"\n\n# more\nsampling = { temperature = 9 }', 7, "[models.two] sampling.temperature"),
        ('path = "HERE/two"\n[models.two.sampling]\ntop_p = 7.5', 6, "[models.two] sampling.top_p"),
        ('path = "HERE/two"\nsampling = {}\nslots = 0', 6, "[models.two] slots: "),
        ('path = "HERE/two"\naliases = [\n  "x",\n  "a b",\n]\nslots = 4', 5, "[models.two] aliases.1: "),
        ('path = """\\\n  HERE/\\\n  two"""\nslots = 0', 7, "[models.two] slots: "),
        (
            'hub = "org/fetched"\npath = "HERE/fetched"\nrevision = "v2"', 6,
            "[models.two] revision: HERE/fetched holds revision v1 (0123456789); to fetch it, run scripts/fetch_model",
        ),
        ('hub = "org/other"\npath = "HERE/fetched"', 4, "[models.two] hub: HERE/fetched holds org/fetched; to fetch"),
        ('path = "HERE/two"\nsampling = { heat = 1 }', 5, "[models.two] sampling.heat: unknown key"),
        ('path = "HERE/two"\ndtype = "int3"', 5, "[models.two] dtype: Input should be"),
    ],
)  # fmt: skip
def test_mistake_is_reported_with_its_line_and_other_entries_are_served(
    models: Path, entry: str, line: int, message: str
) -> None:
    shutil.copytree(models / "one", models / "cut")
    fetched(models, "org/fetched", "v1")
    cut = models / "cut/model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    catalog = read(
        models, f'[models.one]\npath = "HERE/one"\n[models.two]\n{entry}\n[models.seer]\npath = "HERE/seer"\n'
    )
    assert list(catalog.models) == ["one", "seer"]
    (fault,) = catalog.faults
    assert fault.startswith(f"catalog.toml:{line}: ")
    assert message.replace("HERE", str(models)) in fault


def test_mistakes_outside_entries_are_reported(models: Path) -> None:
    catalog = read(models, '[models.one]\npath = "HERE/one\n', model_path=models / "two")
    assert list(catalog.models) == ["two"]
    assert catalog.faults[0].startswith("catalog.toml:2: [models.one] is not TOML")
    catalog = read(models, 'defaults = 1\ndefault = "three"\n[models.one]\npath = "HERE/one"\n["models"."a b"]\n')
    assert catalog.default == "one"
    assert [fault.split(": ")[0] for fault in catalog.faults][:1] == ["catalog.toml:1"]
    assert any("the model three does not exist" in fault and ":2: " in fault for fault in catalog.faults)
    assert any("[models.a b]" in fault for fault in catalog.faults)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ('[models]\none = { path = "HERE/one" }\ntwo = { path = "HERE/two", slots = 0 }', 3, "[models.two] slots: "),
        ('models.one.path = "HERE/one"\nmodels.two.path = "HERE/two"\nmodels.two.slots = 0', 3, "[models.two] slots: "),
        ('[models]\none.path = "HERE/one"\n"two".path = "HERE/two"\ntwo.slots = 0', 4, "[models.two] slots: "),
        ('[models]\none.path = "HERE/one"\ntwo = 5', 3, "[models.two]: must be a table"),
        ('[models.one]\npath = "HERE/one"\n[[models.two]]\npath = "HERE/two"', 3, "[models.two]: must be a table"),
    ],
)
def test_mistakes_in_other_notations_are_reported_with_their_line(
    models: Path, text: str, line: int, message: str
) -> None:
    catalog = read(models, text)
    assert list(catalog.models) == ["one"]
    (fault,) = catalog.faults
    assert fault.startswith(f"catalog.toml:{line}: {message}"), fault


def test_table_that_is_declared_twice_is_one_mistake(models: Path) -> None:
    text = '[models.one]\npath = "HERE/one"\n[models.two]\npath = "HERE/two"\n[models."one"]\npath = "HERE/seer"\n'
    catalog = read(models, text + "[models.one.sampling]\ntop_p = 0.5\n")
    assert list(catalog.models) == ["two"]
    (fault,) = catalog.faults
    assert fault.startswith("catalog.toml:5: [models.one] is not TOML: Cannot declare")


def test_unquoted_name_with_dots_is_explained(models: Path) -> None:
    catalog = read(
        models, '[models.Qwen2.5-7B]\npath = "HERE/one"\n[models."Qwen2.5-7B"]\npath = "HERE/two"\nslots = 0'
    )
    assert 'quote a name that contains dots: [models."Qwen2.5-7B"]' in catalog.faults[0]
    assert catalog.faults[0].startswith("catalog.toml:1: [models.Qwen2]")
    assert catalog.faults[1].startswith("catalog.toml:5: [models.Qwen2.5-7B] slots")


@pytest.mark.parametrize(
    "text", ['"', "[", "[[", "=", 'a = """', "a = [1,\n\n", "[models", "[models.]", "\x00", "[models.a]\nb = [\n[c]"]
)
def test_malformed_file_does_not_stop_the_service(models: Path, text: str) -> None:
    catalog = read(models, text, model_path=models / "two")
    assert list(catalog.models) == ["two"] and catalog.faults


LINES = [
    "[models.one]",
    '[models."one"]',
    "[models.two]",
    "[models.two.sampling]",
    "[models]",
    "[[models]]",
    "[other]",
    "[",
    'path = "HERE/one"',
    'path = "HERE/two"',
    "slots = 4",
    "slots = [",
    "slots = -1",
    'aliases = ["a", "b"]',
    'aliases = ["a"',
    "]",
    '"""',
    "'''",
    "# [models.x]",
    "",
    "temperature = 0.5",
    "sampling = { top_p = 1 }",
    "sampling = 3",
    "sampling.top_p = 2",
    'default = "one"',
    "default = 1",
    "models = 3",
    "models.one = 3",
    "= 4",
    "\x00",
    'path = """',
    "[models.one.two.three]",
]


@given(st.lists(st.sampled_from(LINES), max_size=12))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=300)
def test_any_file_leaves_a_default_and_each_mistake_has_a_valid_line(models: Path, lines: list[str]) -> None:
    catalog = read(models, "\n".join(lines), model_path=models / "seer")
    assert catalog.default in catalog.models
    assert {model.path.name for model in catalog.models.values()} <= {"one", "two", "seer"}
    for fault in catalog.faults:
        number = int(fault.split(":")[1])
        assert 1 <= number <= max(1, len(lines))


def test_examples_in_the_shipped_catalog_are_valid_and_complete() -> None:
    lines = (ROOT / "models/catalog.toml").read_text().splitlines()
    examples = [re.sub(r"^(# ?)+", "", line) for line in lines]
    tables = tomllib.loads("\n".join(line for line in examples if re.match(r"\[|[a-z_]+ = ", line)))["models"]
    assert len(tables) >= 3
    for name, table in tables.items():
        assert re.fullmatch(catalog_module.MODEL_NAME, name) and catalog_module._Entry.model_validate(table)
    assert {key for table in tables.values() for key in table} == set(catalog_module._Entry.model_fields)


def test_unreadable_file_is_reported(models: Path) -> None:
    catalog = load_catalog(Settings(models_file=models, model_path=models / "two"))
    assert list(catalog.models) == ["two"]
    assert catalog.faults == (f"{models.name}:1: the file cannot be read: Is a directory",)


def test_missing_default_is_reported_and_stays_the_default(models: Path) -> None:
    catalog = read(models, 'default = "two"\n[models.one]\npath = "HERE/one"\n[models.two]\npath = "HERE/away"\n')
    assert catalog.default == "two"
    assert catalog.models["two"].path == models / "away"
    assert catalog.faults == (f"catalog.toml:5: [models.two]: there is no model in {models / 'away'}",)


def test_model_path_has_precedence_over_an_entry_with_the_same_name(models: Path) -> None:
    catalog = read(models, '[models.two]\npath = "HERE/one"\n', model_path=models / "two")
    assert catalog.models["two"].path == models / "two"
    assert catalog.faults == (
        "catalog.toml:2: [models.two] has the same name as the model of MODEL_PATH but another path; rename it",
    )


def test_fake_backend_does_not_check_folders(models: Path) -> None:
    (models / "two/model.safetensors").unlink()
    text = '[models.two]\npath = "HERE/two"\n'
    assert list(read(models, text, backend="fake").models) == ["two"]
    assert list(read(models, text).models) == ["SmolLM2-135M-Instruct"]


def test_model_path_is_the_default_and_uses_its_entry(models: Path) -> None:
    text = 'default = "first"\n[models.first]\npath = "HERE/one"\n[models.second]\npath = "HERE/two"\n'
    catalog = read(models, text, model_path=models / "two")
    assert (catalog.default, list(catalog.models)) == ("second", ["first", "second"])
    catalog = read(models, text, model_path=models / "seer")
    assert (catalog.default, list(catalog.models)) == ("seer", ["first", "second", "seer"])
    assert read(models, text).default == "first"


def test_shipped_catalog_has_no_mistakes() -> None:
    catalog = load_catalog(Settings())
    assert catalog.faults == ()


def test_models_that_a_worker_loads_at_startup(models: Path) -> None:
    catalog = read(models, '[models.one]\npath = "HERE/one"\naliases = ["uno"]\n[models.two]\npath = "HERE/two"\n')

    def loads(worker_models: str, index: int = 0) -> tuple[list[str], list[str]]:
        first, unknown = catalog.first(worker_models, index)
        return [model.id for model in first], unknown

    assert loads("") == (["one"], [])
    assert loads("two, uno, one") == (["two", "one"], [])
    assert loads("three,two") == (["two"], ["three"])
    assert [loads("one;two", index)[0] for index in range(3)] == [["one"], ["two"], ["one"]]


def test_missing_file_that_is_set_explicitly_is_reported(models: Path) -> None:
    catalog = load_catalog(Settings(_env_file=None, model_path=models / "one", models_file=models / "none.toml"))
    assert (list(catalog.models), catalog.faults) == (["one"], (f"MODELS_FILE: {models / 'none.toml'} does not exist",))


def test_mistakes_are_sorted_by_line(models: Path) -> None:
    catalog = read(models, '[models.two]\npath = "HERE/no"\n[models.one]\npath = "HERE/one"\nslots = 0\ncontext = 0\n')
    assert [int(fault.split(":")[1]) for fault in catalog.faults] == [2, 5, 6]


def test_a_vision_model_is_served_as_a_text_model_if_the_catalog_says_so(models: Path) -> None:
    catalog = read(
        models, '[models.reader]\npath = "HERE/seer"\nkind = "text"\nadapter = "HERE/lora"\n', backend="fake"
    )
    assert (catalog.models["reader"].kind, catalog.faults) == ("text", ())
