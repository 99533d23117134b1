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
    """Stands in for `ctypes.CDLL`: knows some libraries, remembers what it was asked for."""

    def __init__(self, *known: str, library: Any = None) -> None:
        self.known = known
        self.library = library or SimpleNamespace()
        self.asked: list[str] = []
        self.modes: list[int] = []

    def __call__(self, name: str, mode: int) -> Any:
        self.asked.append(name)
        self.modes.append(mode)
        if name not in self.known:
            raise OSError(f"{name}: cannot open shared object file")
        return self.library


@pytest.fixture
def loader(monkeypatch: pytest.MonkeyPatch) -> Loader:
    """Linux without MLX, without any BLAS."""
    stand_in = Loader()
    monkeypatch.setattr(ctypes, "CDLL", stand_in)
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.delitem(sys.modules, "mlx.core", raising=False)
    for name in ("OPENBLAS_LIB", "CONDA_PREFIX"):
        monkeypatch.delenv(name, raising=False)
    return stand_in


def test_none_found_says_what_to_install(loader: Loader) -> None:
    found = prefer_openblas()

    assert (found.name, found.path) == ("reference", "")
    assert "apt-get install libopenblas0-pthread" in found.reason


def test_first_name_that_loads_is_taken_with_its_symbols_global(loader: Loader) -> None:
    loader.known = ("libopenblasp.so.0", "libopenblas.so")

    assert prefer_openblas() == Blas("openblas", "libopenblasp.so.0")
    assert loader.asked == ["libopenblas.so.0", "libopenblasp.so.0"]
    assert set(loader.modes) == {ctypes.RTLD_GLOBAL}


def test_version_is_what_the_library_says(loader: Loader) -> None:
    class Config:
        restype: Any = None

        def __call__(self) -> bytes:
            assert self.restype is ctypes.c_char_p
            return b"OpenBLAS 0.3.21 Haswell MAX_THREADS=64 "

    loader.known = ("libopenblas.so.0",)
    loader.library = SimpleNamespace(openblas_get_config=Config())

    assert prefer_openblas().version == "OpenBLAS 0.3.21 Haswell MAX_THREADS=64"


def test_chosen_library_goes_first(loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBLAS_LIB", "/opt/blas/libmine.so")
    loader.known = ("libopenblas.so.0", "/opt/blas/libmine.so")

    assert prefer_openblas().path == "/opt/blas/libmine.so"


def test_chosen_library_that_does_not_load_is_passed_over(loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBLAS_LIB", "/nowhere/libmine.so")
    loader.known = ("libopenblas.so.0",)

    assert prefer_openblas().path == "libopenblas.so.0"


def test_conda_environment_is_looked_at(loader: Loader, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = str(tmp_path / "lib/libopenblas.so.0")
    monkeypatch.setenv("CONDA_PREFIX", str(tmp_path))
    loader.known = (library,)

    assert prefer_openblas().path == library


def test_too_late_once_mlx_is_loaded(loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    loader.known = ("libopenblas.so.0",)
    monkeypatch.setitem(sys.modules, "mlx.core", SimpleNamespace())

    found = prefer_openblas()

    assert found.name == "reference"
    assert "before OpenBLAS" in found.reason
    assert loader.asked == []


@pytest.mark.parametrize(("system", "name"), [("Darwin", "accelerate"), ("FreeBSD", "reference")])
def test_other_systems_are_left_alone(loader: Loader, monkeypatch: pytest.MonkeyPatch, system: str, name: str) -> None:
    loader.known = blas._NAMES
    monkeypatch.setattr(platform, "system", lambda: system)

    assert prefer_openblas().name == name
    assert loader.asked == []
