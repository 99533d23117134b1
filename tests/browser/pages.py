"""What the tests of the console do on its pages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

from playwright.sync_api import Page, ViewportSize

PHONE: Final[ViewportSize] = {"width": 390, "height": 844}
OpenPage = Callable[..., Page]
_AXE: Final = (Path(__file__).parent / "vendor/axe.min.js").read_text()


def sign_in(page: Page, key: str) -> None:
    """Fill in the sign-in form."""
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Sign in").click()


def violations(page: Page) -> list[str]:
    """Return what axe-core criticises on a page: the rule, and the elements."""
    page.evaluate(_AXE)
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    return [f"{each['id']}: {node['html'][:200]} {node['failureSummary']}" for each in found for node in each["nodes"]]
