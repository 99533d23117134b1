"""Checks, manifests and atomic creation of model folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts.model_files.manifest import Origin, check_replaceable, is_intact, read_origin, write_manifest
from scripts.model_files.staging import staged
from shared.models.folder import ModelError, check_folder
from tests.support.small_models import make_folder

# Checks


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete folder, though not of a real model."""
    return make_folder(tmp_path / "complete")


def rename(name: str, to: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).rename(folder / to)


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


INDEX = json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}})


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (rename("config.json", "c.json"), "has no config.json"),
        (write("config.json", "{"), "config.json is not valid JSON"),
        (write("config.json", "[]"), "config.json is not a JSON object"),
        (write("config.json", "{}"), "has no model_type"),
        (write("config.json", '{"model_type": "x", "model_file": "m.py"}'), r"code \(m.py\), which is not allowed"),
        (rename("tokenizer.json", "t.json"), "has no tokenizer"),
        (rename("model.safetensors", "other"), r"has no weights \(model\*.safetensors\)"),
        (rename("model.safetensors", "pytorch_model.bin"), r"pickle files \(pytorch_model.bin\).*not allowed"),
        (write("model.safetensors.index.json", INDEX), "lacks the weight file model-00002.safetensors"),
        (write("model.safetensors.index.json", "{}"), "has no weight_map"),
        (write("model.safetensors", ""), "not a complete safetensors file"),
        (cut, "has [0-9,]+ of [0-9,]+ bytes"),
        (write("optimizer.pt", ""), r"contains a pickle file.*optimizer\.pt.*not allowed; .*--copy"),
        (write("modeling_x.py", ""), r"contains Python code .*modeling_x\.py.*not allowed; .*--copy"),
    ],
)
def test_a_defect_is_reported_in_one_line(folder: Path, damage: Callable[[Path], object], reason: str) -> None:
    check_folder(folder)
    damage(folder)

    with pytest.raises(ModelError, match=reason) as raised:
        check_folder(folder)
    assert "\n" not in str(raised.value)


# Manifests


def test_a_manifest_has_the_origin_and_detects_changes(folder: Path) -> None:
    origin = Origin("somewhere", "1", dtype="float32")
    write_manifest(folder, origin)
    assert read_origin(folder) == origin
    assert is_intact(folder)

    (folder / "tokenizer.json").write_text("[]")  # of the same length
    assert not is_intact(folder)
    (folder / "tokenizer.json").unlink()
    assert not is_intact(folder)
    assert read_origin(folder) == origin


def test_a_copied_manifest_is_replaced(folder: Path) -> None:
    write_manifest(folder, Origin("somewhere", "1"))
    write_manifest(folder, Origin("elsewhere", "2"))
    assert is_intact(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"source": "x"}'])
def test_an_invalid_manifest_is_ignored(folder: Path, content: str) -> None:
    (folder / "mlxq.json").write_text(content)

    assert read_origin(folder) is None
    assert not is_intact(folder)


def test_a_folder_from_another_source_is_not_replaced(folder: Path, tmp_path: Path) -> None:
    check_replaceable(tmp_path / "nothing", "us")
    with pytest.raises(ModelError, match="--force replaces it"):
        check_replaceable(folder, "us")

    write_manifest(folder, Origin("others", "1"))
    with pytest.raises(ModelError, match="contains others"):
        check_replaceable(folder, "us")

    write_manifest(folder, Origin("us", "1"))
    check_replaceable(folder, "us")


# Atomic creation


def test_a_staged_folder_appears_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with staged(target) as partial:
        (partial / "file").write_text("new")
        assert not target.exists()

    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (target / "file").read_text() == "new"


def test_a_staged_folder_replaces_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").touch()
    with staged(target) as partial:
        (partial / "new").touch()

    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit, OSError])
def test_an_interruption_leaves_no_files(tmp_path: Path, interruption: type[BaseException]) -> None:
    with pytest.raises(interruption), staged(tmp_path / "model") as partial:  # noqa: PT012
        (partial / "half").touch()
        raise interruption

    assert list(tmp_path.iterdir()) == []


def test_files_of_a_killed_run_are_discarded(tmp_path: Path) -> None:
    partial = tmp_path / ".model.partial"
    partial.mkdir()
    (partial / "half").touch()
    with staged(tmp_path / "model"):
        pass

    assert list((tmp_path / "model").iterdir()) == []


def test_an_interrupted_download_can_be_continued(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), staged(tmp_path / "model", resumable=True) as partial:  # noqa: PT012
        (partial / "half").touch()
        raise KeyboardInterrupt
    assert not (tmp_path / "model").exists()

    with staged(tmp_path / "model", resumable=True) as partial:
        assert (partial / "half").exists()
