"""Pinned requirements are complete, consistent, and contain no URL of a package index."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from shared.settings import ROOT

SETS = ("web", "worker", "cuda13", "stack", "dev", "clients", "pydantic-ai", "aider", "aiperf", "agents")
PIN = re.compile(
    r"^(?P<name>[a-z0-9][a-z0-9._-]*)(?:\[[^]]*])?==(?P<version>\S+)"
    r"(?P<rest>[^\n]*(?:\n    --hash\S+.*)*)",
    re.MULTILINE,
)


def folder() -> Path:
    return ROOT / "requirements"


def pins(name: str) -> dict[str, str]:
    """Return versions by package and marker."""
    text = (folder() / f"{name}.txt").read_text()
    return {match["name"] + match["rest"].partition("\\")[0].strip(): match["version"] for match in PIN.finditer(text)}


@pytest.mark.parametrize("name", SETS)
def test_every_pin_has_hashes_and_no_url(name: str) -> None:
    text = (folder() / f"{name}.txt").read_text()
    assert pins(name)
    assert all("--hash=sha256:" in match["rest"] for match in PIN.finditer(text))
    assert not re.search(r"https?://|--(extra-)?index-url|--find-links|file:", text)


@pytest.mark.parametrize("name", ["web", "worker", "stack"])
def test_the_sets_agree(name: str) -> None:
    packages = {key.partition(";")[0].strip(): version for key, version in pins(name).items()}
    everything = {key.partition(";")[0].strip(): version for key, version in pins("dev").items()}
    assert {package: everything.get(package) for package in packages} == packages


@pytest.mark.parametrize("name", SETS)
def test_every_requirement_has_a_comment(name: str) -> None:
    lines = (folder() / f"{name}.in").read_text().splitlines()
    assert all("#" in line or line.startswith("-r ") for line in lines if line)


@pytest.mark.parametrize("name", SETS)
def test_every_requirement_is_pinned(name: str) -> None:
    required = re.findall(r"^([a-z0-9][a-z0-9._-]*)", (folder() / f"{name}.in").read_text(), re.MULTILINE)
    pinned = {key.partition(";")[0].strip() for key in pins(name)}
    assert set(required) <= pinned


def test_cuda_is_pinned_for_the_version_of_mlx() -> None:
    version = pins("worker")["mlx"]
    assert {name.partition(";")[0].strip(): each for name, each in pins("cuda13").items()}["mlx-cuda-13"] == version
