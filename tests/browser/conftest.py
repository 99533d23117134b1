"""A headless Chromium, and pages of the console that are signed in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.browser import chromium
from tests.browser.pages import OpenPage
from tests.browser.stack import console_stack
from tests.plugins.stack import Stack
from tests.support.model_hub import ModelHub, model_hub
from web.access.sessions import COOKIE, Sessions

TIMEOUT_MS = 30_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One browser process; every page has a profile of its own.

    Not for the session: Playwright runs an event loop in this thread, in which other tests could not run their own.
    """
    path = chromium.find()
    assert path is not None, "Chromium is missing: install it, or set CHROMIUM to its path (scripts/test installs it)"
    expect.set_options(timeout=TIMEOUT_MS)
    with sync_playwright() as playwright:
        # Chromium's own sandbox does not start for root and in most containers. It opens only pages of the tests.
        running = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def hub(tiny_model_path: Path) -> Iterator[ModelHub]:
    """A hub from which the worker can download a model."""
    with model_hub(tiny_model_path) as hub:
        yield hub


@pytest.fixture(scope="module")
def console(hub: ModelHub) -> Iterator[Stack]:
    """A stack with a scripted model, which the tests of a module share."""
    with console_stack(HF_ENDPOINT=hub.url) as stack:
        yield stack


@pytest.fixture
def open_page(browser: Browser, console: Stack) -> Iterator[OpenPage]:
    """Opens a page of the console, signed in by default. Errors of its scripts fail the test."""
    contexts, errors = [], list[str]()

    def open_at(path: str, *, key: str | None = None, signed_in: bool = True, **options: object) -> Page:
        context = browser.new_context(base_url=console.url, **options)  # type: ignore[arg-type]
        context.set_default_timeout(TIMEOUT_MS)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda line: errors.append(line.text) if "Content Security Policy" in line.text else None)
        if signed_in:  # without the form, whose use is limited
            session = Sessions(console.redis).begin((key or console.key).split("_")[1])
            context.add_cookies([{"name": COOKIE, "value": session.token, "url": console.url}])
        page.goto(path)
        return page

    yield open_at
    for context in contexts:
        context.close()
    assert errors == []
