"""Writing `.env` loses no content and leaks no secret."""

from __future__ import annotations

import socket
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from dotenv import dotenv_values

from scripts.stack.env_file import add_missing


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_file_is_created_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "conf" / ".env"
    add_missing(path, {"MLXQ_API_KEY": "k", "FLOWER_PASSWORD": "p"})
    assert dotenv_values(path) == {"MLXQ_API_KEY": "k", "FLOWER_PASSWORD": "p"}
    assert mode(path) == 0o600


def test_existing_lines_are_kept(tmp_path: Path) -> None:
    path = tmp_path / ".env"
    path.write_text("# mine\nPORT=81\nexport MLXQ_API_KEY='old'")
    add_missing(path, {"MLXQ_API_KEY": "new", "FLOWER_PASSWORD": "p"})
    assert path.read_text() == "# mine\nPORT=81\nexport MLXQ_API_KEY='old'\nFLOWER_PASSWORD=p\n"


def test_a_file_with_a_new_secret_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / ".env"
    path.write_text("PORT=81\n")
    path.chmod(0o644)
    add_missing(path, {"MLXQ_API_KEY": "k"})
    assert mode(path) == 0o600


@pytest.mark.parametrize("empty", ["MLXQ_API_KEY=", "MLXQ_API_KEY = ''", "export MLXQ_API_KEY="])
def test_an_empty_value_is_replaced(tmp_path: Path, empty: str) -> None:
    path = tmp_path / ".env"
    path.write_text(f"{empty}\nPORT=81\n")
    add_missing(path, {"MLXQ_API_KEY": "k"})
    assert path.read_text() == "PORT=81\nMLXQ_API_KEY=k\n"


def test_a_complete_file_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / ".env"
    path.write_text("MLXQ_API_KEY=k")
    before = path.stat()
    add_missing(path, {"MLXQ_API_KEY": "other"})
    assert path.stat() == before


def test_the_target_of_a_link_is_written(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / ".env"
    real.write_text("PORT=81\n")
    link.symlink_to(real)
    add_missing(link, {"MLXQ_API_KEY": "k"})
    assert link.is_symlink()
    assert dotenv_values(real)["MLXQ_API_KEY"] == "k"


def test_concurrent_first_runs_agree_on_one_key(tmp_path: Path) -> None:
    path = tmp_path / ".env"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: add_missing(path, {"MLXQ_API_KEY": f"k{n}"}), range(16)))
    assert path.read_text().count("MLXQ_API_KEY=") == 1
    assert [each.name for each in tmp_path.iterdir()] == [".env"]


def test_a_special_file_is_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"  # instead of /dev/null, which a process of root could replace
    with socket.socket(socket.AF_UNIX) as special:
        special.bind(str(path))
    with pytest.raises(OSError, match="not a regular file") as caught:
        add_missing(path, {"MLXQ_API_KEY": "k"})
    assert caught.value.filename == str(path)
    assert path.is_socket()
