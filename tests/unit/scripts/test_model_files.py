"""Whether a folder is a model, where it came from, and that it appears whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts.model_files.manifest import Origin, check_replaceable, is_intact, read_origin, write_manifest
from scripts.model_files.staging import staged
from shared.models.folder import ModelError, check_folder
from tests.support.small_models import make_folder

# What a folder must hold


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that is complete, though no model."""
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
    ("damage", "named"),
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
def test_incomplete_folder_is_named_in_one_line(folder: Path, damage: Callable[[Path], object], named: str) -> None:
    check_folder(folder)
    damage(folder)

    with pytest.raises(ModelError, match=named) as raised:
        check_folder(folder)
    assert "\n" not in str(raised.value)


# The manifest


def test_manifest_tells_origin_and_notices_changes(folder: Path) -> None:
    origin = Origin("somewhere", "1", dtype="float32")
    write_manifest(folder, origin)
    assert read_origin(folder) == origin
    assert is_intact(folder)

    (folder / "tokenizer.json").write_text("[]")  # of the same length
    assert not is_intact(folder)
    (folder / "tokenizer.json").unlink()
    assert not is_intact(folder)
    assert read_origin(folder) == origin


def test_a_manifest_that_came_with_a_copy_is_replaced(folder: Path) -> None:
    write_manifest(folder, Origin("somewhere", "1"))
    write_manifest(folder, Origin("elsewhere", "2"))
    assert is_intact(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"source": "x"}'])
def test_manifest_that_cannot_be_read_counts_as_none(folder: Path, content: str) -> None:
    (folder / "mlxq.json").write_text(content)

    assert read_origin(folder) is None
    assert not is_intact(folder)


def test_what_somebody_else_put_there_is_not_replaced(folder: Path, tmp_path: Path) -> None:
    check_replaceable(tmp_path / "nothing", "us")
    with pytest.raises(ModelError, match="--force replaces it"):
        check_replaceable(folder, "us")

    write_manifest(folder, Origin("others", "1"))
    with pytest.raises(ModelError, match="holds others"):
        check_replaceable(folder, "us")

    write_manifest(folder, Origin("us", "1"))
    check_replaceable(folder, "us")


# Whole or not at all


def test_staged_folder_appears_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with staged(target) as partial:
        (partial / "file").write_text("new")
        assert not target.exists()

    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (target / "file").read_text() == "new"


def test_staged_folder_replaces_the_old_one_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").touch()
    with staged(target) as partial:
        (partial / "new").touch()

    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit, OSError])
def test_interruption_leaves_nothing(tmp_path: Path, interruption: type[BaseException]) -> None:
    with pytest.raises(interruption), staged(tmp_path / "model") as partial:  # noqa: PT012
        (partial / "half").touch()
        raise interruption

    assert list(tmp_path.iterdir()) == []


def test_killed_run_leaves_nothing_to_the_next(tmp_path: Path) -> None:
    left = tmp_path / ".model.partial"
    left.mkdir()
    (left / "half").touch()
    with staged(tmp_path / "model"):
        pass

    assert list((tmp_path / "model").iterdir()) == []


def test_interrupted_download_is_offered_again(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), staged(tmp_path / "model", resumable=True) as partial:  # noqa: PT012
        (partial / "half").touch()
        raise KeyboardInterrupt
    assert not (tmp_path / "model").exists()

    with staged(tmp_path / "model", resumable=True) as partial:
        assert (partial / "half").exists()
