"""The names of the test files."""

from __future__ import annotations

from collections import Counter
from pathlib import Path


def test_test_files_have_different_names() -> None:
    """pytest imports them by name, and cannot collect two of the same name."""
    names = Counter(path.name for path in Path(__file__).resolve().parents[2].rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []
