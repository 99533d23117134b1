"""Takes the screenshots of docs/console.md, with a stack of its own: `python -m tests.browser.screenshots [FOLDER]`."""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from playwright.sync_api import Browser, Page, expect, sync_playwright

from shared.jobs.limits import OwnerLimits
from shared.jobs.record import Priority
from shared.redis import keys
from shared.settings import ROOT
from tests.browser import chromium
from tests.browser.pages import PHONE
from tests.browser.stack import console_stack
from tests.plugins.stack import Stack
from tests.support.waiting import eventually
from web.access.api_keys import KeyStore
from web.access.sessions import COOKIE, Sessions
from web.cluster.samples import INTERVAL_S, KEPT, Percentiles, Sample
from web.console.layout import NAVIGATION

_DESKTOP: Final = {"width": 1360, "height": 900}
_PROMPTS: Final = (
    "Explain how a lighthouse works",
    "fail please",
    "How does a durable queue work?",
    "Summarise this page",
)
_PRIORITIES: Final = ("normal", "batch", "high")


def last_hour() -> Iterator[Sample]:
    """Yield samples of an hour with some load."""
    noise, now = random.Random(3), time.time()
    for number in range(KEPT - 1):
        wave = 0.5 + 0.5 * math.sin(number / 14)
        yield Sample(
            at=now - (KEPT - number) * INTERVAL_S,
            waiting={"normal": int(30 * wave * noise.random()), "batch": int(90 * wave)},
            running=int(8 * wave) + 1,
            slots=8,
            tokens_per_s=round(300 * wave + 60 * noise.random(), 1),
            memory_bytes=int(4.1e9 + 1e9 * wave),
            ended={"succeeded": int(40 * wave) + 5, "failed": int(noise.random() * 1.3)},
            ttft=Percentiles(0.15 + 0.1 * wave, 0.5 + 0.6 * wave * noise.random()),
            itl=Percentiles(0.018 + 0.006 * wave, 0.05 + 0.03 * noise.random()),
        )


def fill(stack: Stack) -> str:
    """Write samples and submit jobs; return the id of one that failed."""
    stack.redis.delete(keys.SAMPLES)
    stack.redis.rpush(keys.SAMPLES, *(sample.to_json() for sample in last_hour()))
    store = KeyStore(stack.settings.keys_file)
    store.create("chat application", {"infer"}, "600/minute", max_priority=Priority.HIGH)
    store.create("nightly evaluation", {"infer"}, limits=OwnerLimits(max_queued=500), max_priority=Priority.BATCH)
    with stack.client() as client:

        def submit(**body: Any) -> str:
            return str(client.request("POST", "/v1/jobs", json=body).json()["id"])

        for number in range(24):
            metadata = {"project": ("atlas", "orion")[number % 2]}
            submit(prompt=_PROMPTS[number % 4], priority=_PRIORITIES[number % 3], metadata=metadata)
        eventually(lambda: stack.registry.waiting("chat-demo") == 0, "the jobs have started", 120)
        failed = submit(messages=[{"role": "user", "content": "fail please"}], metadata={"project": "atlas"})
        for number in range(14):
            submit(prompt="Count slowly", priority=_PRIORITIES[number % 2])
        eventually(lambda: client.request("GET", f"/v1/jobs/{failed}").json()["status"] == "failed", "a job fails", 120)
    return failed


def opened(browser: Browser, stack: Stack, **options: Any) -> Page:
    """Open a signed-in page."""
    context = browser.new_context(base_url=stack.url, **options)
    session = Sessions(stack.redis).begin(stack.key.split("_")[1])
    context.add_cookies([{"name": COOKIE, "value": session.token, "url": stack.url}])
    return context.new_page()


def converse(page: Page) -> None:
    """Show a conversation in the playground."""
    page.goto("/console/playground")
    page.get_by_label("Class").select_option("high")
    page.get_by_label("Message", exact=True).fill("How does a lighthouse work?")
    page.keyboard.press("Control+Enter")
    expect(page.locator(".turn-assistant .turn-head")).to_contain_text("tok/s", timeout=120_000)


def take(browser: Browser, stack: Stack, failed: str, folder: Path) -> None:
    """Take all screenshots."""
    paths = {name: path for name, path, _ in NAVIGATION} | {"job": f"/console/jobs/{failed}"}
    paths["jobs"] = paths.pop("jobs")  # last: some jobs have ended by then, and some still run
    for scheme, size, suffix in (("light", _DESKTOP, ""), ("dark", _DESKTOP, "-dark"), ("dark", PHONE, "-phone")):
        page = opened(browser, stack, color_scheme=scheme, viewport=size)
        for name, path in paths.items():
            if name == "playground":
                converse(page)
            else:
                page.goto(path)
            if name == "overview":
                expect(page.locator(".u-over").first).to_be_visible()
            page.screenshot(path=folder / f"console-{name}{suffix}.png")
        page.context.close()


def main() -> None:
    """Take the screenshots."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs/images"
    with console_stack(background=False) as stack, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium.find(), args=["--no-sandbox"])
        take(browser, stack, fill(stack), folder)
        browser.close()


if __name__ == "__main__":
    main()
