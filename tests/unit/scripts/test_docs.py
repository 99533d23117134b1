"""The documentation points only to what exists: files, headings, commands, settings and error codes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest
from pydantic import BaseModel

from shared.errors import Expiry, JobFailure
from shared.settings import ROOT, Settings
from tests.support.fake_redis import FakeRedis
from web.app import create_app
from web.http.openapi_texts import ERROR_CODES
from web.schemas.health import HealthView, RedisView, WorkerMemory, WorkerView
from web.schemas.jobs import AttemptView, JobView, Output, Timings, TokenLogprob, Usage
from web.schemas.models import LoadRequest, ModelView, OperationView, UnloadRequest
from web.schemas.requests import InferenceRequest

MOST_README_LINES = 150
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "THIRD_PARTY_NOTICES.md")),
    *(ROOT / name for name in ("models/README.md", "models/ui-micro/README.md", "models/ui-micro-gemma3/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
SOURCES = {
    path.name
    for folder in ("web", "worker", "shared", "scripts", "tests")
    for pattern in ("*.py", "*.lua")
    for path in (ROOT / folder).rglob(pattern)
}
_LINK = re.compile(r"\]\(([^()\s]+)\)")
_SCRIPT = re.compile(r"(?<![\w/.])scripts/[\w/.-]*\w")
_PATH = re.compile(r"(web|worker|shared|scripts|tests|deploy|requirements)/[\w./-]+")
_CODE_BLOCK = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", _CODE_BLOCK.sub("", page.read_text()), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in plain}


def broken_links(page: Path) -> Iterator[str]:
    for link in _LINK.findall(_CODE_BLOCK.sub("", page.read_text())):
        path, _, anchor = unquote(link).partition("#")
        if "://" in path:
            continue
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            yield link


def missing_files(page: Path) -> Iterator[str]:
    """Paths, and names of Python and Lua files, that are in backticks. Names in capitals are placeholders."""
    names = set(re.findall(r"`([\w./-]+)`", _CODE_BLOCK.sub("", page.read_text())))
    for name in sorted(names):
        file = name.rpartition("/")[2]
        if file.partition(".")[0].isupper():
            continue
        if _PATH.fullmatch(name):
            if not (ROOT / name).exists():
                yield name
        elif name.endswith((".py", ".lua")) and file not in SOURCES:
            yield name


each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@each_page
def test_relative_links_resolve(page: Path) -> None:
    assert list(broken_links(page)) == []


@each_page
def test_the_scripts_that_it_names_exist(page: Path) -> None:
    named = set(_SCRIPT.findall(page.read_text()))
    assert sorted(name for name in named if not (ROOT / name).exists()) == []


@each_page
def test_the_source_files_that_it_names_exist(page: Path) -> None:
    assert list(missing_files(page)) == []


def test_the_checks_find_what_is_broken(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    links = "[a](#a-heading-really) [b](#none) [c](none.md) [d](page.md)"
    page.write_text(f"# A heading, really\n{links} `scripts/none` `none.lua`\n")
    assert list(broken_links(page)) == ["#none", "none.md"]
    assert _SCRIPT.findall(page.read_text()) == ["scripts/none"]
    assert list(missing_files(page)) == ["none.lua", "scripts/none"]


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= MOST_README_LINES


def test_the_map_lists_every_page() -> None:
    listed = set(_LINK.findall((ROOT / "docs/README.md").read_text()))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"} <= listed


def test_every_error_code_is_documented() -> None:
    page = (ROOT / "docs/api.md").read_text()
    codes = {code for each in ERROR_CODES.values() for code in each} | {*JobFailure} | {*Expiry}
    assert sorted(code for code in codes if f"`{code}`" not in page) == []


DOCUMENTED: list[type[BaseModel]] = [
    *(InferenceRequest, LoadRequest, UnloadRequest),
    *(JobView, AttemptView, Output, TokenLogprob, Usage, Timings),
    *(ModelView, OperationView, HealthView, RedisView, WorkerView, WorkerMemory),
]


@pytest.mark.parametrize("model", DOCUMENTED)
def test_every_field_is_documented(model: type[BaseModel]) -> None:
    page = (ROOT / "docs/api.md").read_text()
    assert sorted(name for name in model.model_fields if f"`{name}`" not in page) == []


def test_every_route_is_documented(tmp_path: Path) -> None:
    page = re.sub(r"\{\w+\}", "{id}", (ROOT / "docs/api.md").read_text())
    app = create_app(Settings(data_dir=tmp_path), FakeRedis())
    rules = [rule for rule in app.url_map.iter_rules() if not rule.endpoint.startswith("console.")]
    paths = {re.sub(r"<(?:\w+:)?\w+>", "{id}", rule.rule) for rule in rules}
    assert sorted(path for path in paths if not path.startswith("/docs/") and path not in page) == []
