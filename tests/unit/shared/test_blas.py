"""Loading OpenBLAS in front of MLX's reference BLAS."""

from __future__ import annotations

import ctypes
import platform
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shared import blas
from shared.blas import Blas, prefer_openblas


class Loader:
    """A fake `ctypes.CDLL` that has some libraries and records its calls."""

    def __init__(self, *available: str, library: Any = None) -> None:
        self.available = available
        self.library = library or SimpleNamespace()
        self.requested: list[str] = []
        self.modes: list[int] = []

    def __call__(self, name: str, mode: int) -> Any:
        self.requested.append(name)
        self.modes.append(mode)
        if name not in self.available:
            raise OSError(f"{name}: cannot open shared object file")
        return self.library


@pytest.fixture
def loader(monkeypatch: pytest.MonkeyPatch) -> Loader:
    """A Linux system without MLX and without BLAS libraries."""
    fake = Loader()
    monkeypatch.setattr(ctypes, "CDLL", fake)
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.delitem(sys.modules, "mlx.core", raising=False)
    for name in ("OPENBLAS_LIB", "CONDA_PREFIX"):
        monkeypatch.delenv(name, raising=False)
    return fake


def test_missing_library_reports_what_to_install(loader: Loader) -> None:
    result = prefer_openblas()

    assert (result.name, result.path) == ("reference", "")
    assert "apt-get install libopenblas0-pthread" in result.reason


def test_first_available_library_is_loaded_with_global_symbols(loader: Loader) -> None:
    loader.available = ("libopenblasp.so.0", "libopenblas.so")

    assert prefer_openblas() == Blas("openblas", "libopenblasp.so.0")
    assert loader.requested == ["libopenblas.so.0", "libopenblasp.so.0"]
    assert set(loader.modes) == {ctypes.RTLD_GLOBAL}


def test_version_is_the_librarys_description(loader: Loader) -> None:
    class Config:
        restype: Any = None

        def __call__(self) -> bytes:
            assert self.restype is ctypes.c_char_p
            return b"OpenBLAS 0.3.21 Haswell MAX_THREADS=64 "

    loader.available = ("libopenblas.so.0",)
    loader.library = SimpleNamespace(openblas_get_config=Config())

    assert prefer_openblas().version == "OpenBLAS 0.3.21 Haswell MAX_THREADS=64"


def test_configured_library_has_precedence(loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBLAS_LIB", "/opt/blas/libmine.so")
    loader.available = ("libopenblas.so.0", "/opt/blas/libmine.so")

    assert prefer_openblas().path == "/opt/blas/libmine.so"


def test_configured_library_that_does_not_load_is_skipped(loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBLAS_LIB", "/nowhere/libmine.so")
    loader.available = ("libopenblas.so.0",)

    assert prefer_openblas().path == "libopenblas.so.0"


def test_conda_environment_is_searched(loader: Loader, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = str(tmp_path / "lib/libopenblas.so.0")
    monkeypatch.setenv("CONDA_PREFIX", str(tmp_path))
    loader.available = (library,)

    assert prefer_openblas().path == library


def test_nothing_is_loaded_after_mlx(loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    loader.available = ("libopenblas.so.0",)
    monkeypatch.setitem(sys.modules, "mlx.core", SimpleNamespace())

    result = prefer_openblas()

    assert result.name == "reference"
    assert "before OpenBLAS" in result.reason
    assert loader.requested == []


@pytest.mark.parametrize(("system", "name"), [("Darwin", "accelerate"), ("FreeBSD", "reference")])
def test_other_systems_load_nothing(loader: Loader, monkeypatch: pytest.MonkeyPatch, system: str, name: str) -> None:
    loader.available = blas._NAMES
    monkeypatch.setattr(platform, "system", lambda: system)

    assert prefer_openblas().name == name
    assert loader.requested == []
