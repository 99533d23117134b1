"""The console in a real browser: signing in, streaming with a reload, cancelling, models, batches, jobs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.browser.pages import PHONE, OpenPage, sign_in, violations
from tests.browser.stack import NUMBERS, start_vision_worker
from tests.plugins.stack import Stack
from tests.support.model_hub import ModelHub
from tests.support.waiting import eventually
from web.access.api_keys import KeyStore
from web.console.layout import NAVIGATION

pytestmark = pytest.mark.slow


PATHS = [path for _, path, _ in NAVIGATION]


def ask(page: Page, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Control+Enter")


def answer(page: Page) -> str:
    return page.locator(".turn-assistant .turn-text").last.inner_text()


def test_a_wrong_key_is_refused_and_the_right_one_leads_to_the_page_that_was_asked_for(
    console: Stack, open_page: OpenPage
) -> None:
    page = open_page("/console/models", signed_in=False)
    sign_in(page, "mlxq_00000000_" + "a" * 43)
    expect(page.get_by_role("alert")).to_have_text("The API key is unknown or revoked.")
    sign_in(page, console.key)
    expect(page.get_by_role("heading", level=1)).to_have_text("Models")
    (cookie,) = [each for each in page.context.cookies() if each["name"] == "mlxq_session"]
    assert cookie["httpOnly"] and cookie["sameSite"] == "Strict"
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Sign in")
    page.context.add_cookies([{"name": cookie["name"], "value": cookie["value"], "url": console.url}])
    page.goto("/")
    expect(page.get_by_role("heading", level=1)).to_have_text("Sign in")  # the session ended in Redis, too


def test_an_answer_continues_after_a_reload(open_page: OpenPage) -> None:
    page = open_page("/console/playground")
    ask(page, "Count slowly")
    expect(page.locator(".turn-assistant .turn-text").last).to_contain_text("0 1 2 3")
    page.reload()
    expect(page.locator(".turn-user")).to_contain_text("Count slowly")
    expect(page.locator(".turn-streaming")).to_have_count(1)
    expect(page.locator(".turn-streaming")).to_have_count(0)
    assert answer(page) == NUMBERS
    page.get_by_text("Reasoning", exact=True).last.click()
    expect(page.locator(".turn-assistant details .turn-text")).to_have_text("Count.")


def test_a_stream_is_stopped_and_the_job_is_cancelled(open_page: OpenPage) -> None:
    page = open_page("/console/playground")
    ask(page, "Count slowly")
    expect(page.locator(".turn-assistant .turn-text").last).to_contain_text("0 1 2")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".turn-assistant .badge")).to_have_text("cancelled")
    page.get_by_role("link", name="job", exact=True).click()
    expect(page.locator(".facts .badge")).to_have_text("cancelled")
    page.get_by_role("button", name="Load the events").click()
    expect(page.locator("[data-replay-events] li").last).to_contain_text("cancelled")
    assert page.locator("[data-replay-text]").inner_text().startswith("<think>")


def test_a_tool_is_called_and_its_result_sent(open_page: OpenPage) -> None:
    page = open_page("/console/playground")
    page.locator("#tools summary").click()
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    page.get_by_label("Tools as JSON").fill(json.dumps([tool]))
    ask(page, "What is the weather in Oslo?")
    page.get_by_label("Result of weather").fill("12 degrees")
    page.get_by_role("button", name="Send the results").click()
    expect(page.locator(".turn-assistant .turn-text").last).to_have_text("It is 12 degrees in Oslo.")
    page.get_by_role("button", name="Code", exact=True).click()
    expect(page.locator("[data-code-text]")).to_contain_text('"tool_call_id"')
    page.keyboard.press("ArrowRight")


def test_jobs_are_found_and_a_failed_one_runs_again(console: Stack, open_page: OpenPage) -> None:
    with console.client() as client:
        body = {"prompt": "fail please", "metadata": {"run": "seven"}}
        job = client.request("POST", "/v1/jobs", json=body, headers={"Prefer": "wait=20"}).json()
    page = open_page("/console/jobs?metadata=run%3Dseven")
    expect(page.locator("tbody tr")).to_have_count(1)
    page.get_by_label("Status").select_option("failed")
    page.locator("tbody a").first.click()
    expect(page.get_by_text("fail please")).to_be_visible()
    page.get_by_role("button", name="Run again").click()
    page.wait_for_url(lambda url: "/console/jobs/job_" in url and job["id"] not in url)
    expect(page.locator(".facts .badge")).to_have_text("failed")


def test_a_job_is_cancelled_from_the_list_with_the_keyboard(console: Stack, open_page: OpenPage) -> None:
    with console.client() as client:
        client.request("POST", "/v1/jobs", json={"prompt": "Count slowly", "metadata": {"run": "eight"}})
    page = open_page("/console/jobs?metadata=run%3Deight")
    page.get_by_role("button", name="Cancel job").focus()
    page.keyboard.press("Enter")
    expect(page.locator("tbody .badge")).to_have_text("cancelled")


def test_a_model_is_loaded_pinned_and_unloaded(open_page: OpenPage) -> None:
    page = open_page("/console/models")
    card = page.locator("article", has=page.get_by_role("heading", name="code-demo"))
    card.get_by_role("button", name="Load code-demo").click()
    expect(card.locator(".card-head .badge")).to_have_text("warm")
    card.get_by_role("button", name="Pin code-demo").click()
    expect(card.get_by_text("pinned")).to_be_visible()
    expect(card.get_by_text("unused for")).to_be_visible()
    card.get_by_role("button", name="Unpin code-demo").click()
    expect(card.get_by_text("pinned")).to_have_count(0)
    card.get_by_role("button", name="Unload code-demo").click()
    page.get_by_role("dialog").get_by_role("button", name="Unload").click()
    expect(card.locator(".card-head .badge")).to_have_text("cold")


def test_aliases_of_a_model_are_changed(console: Stack, open_page: OpenPage) -> None:
    page = open_page("/console/models")
    card = page.locator("article", has=page.get_by_role("heading", name="code-demo"))
    for typed, shown in (("programmer, dev", 3), ("", 1)):
        card.get_by_role("button", name="Aliases of code-demo").click()
        dialog = page.get_by_role("dialog")
        expect(dialog.get_by_text("The catalog's file also has coder.")).to_be_visible()
        assert violations(page) == []
        dialog.get_by_label("Other names").fill(typed)
        dialog.get_by_role("button", name="Save").click()
        expect(card.locator(".tag", has_text="alias ")).to_have_count(shown)
    with console.client() as client:
        assert client.request("GET", "/v1/models/coder").json()["id"] == "code-demo"


def test_a_model_is_downloaded_with_progress_after_a_cancelled_attempt(hub: ModelHub, open_page: OpenPage) -> None:
    page = open_page("/console/models")
    hub.stalls["model.safetensors"] = 5 * 2**20
    for _ in range(2):
        page.get_by_role("button", name="Download a model").click()
        assert violations(page) == []
        page.get_by_label("Repository").fill("org/model")
        page.get_by_label("Name in this service").fill("tiny")
        page.get_by_role("dialog").get_by_role("button", name="Download").click()
        row = page.get_by_role("row", name="download org/model").first
        if hub.stalls:
            expect(row).to_contain_text("downloading")
            expect(row).to_contain_text("MiB of")
            row.get_by_role("button", name="Cancel").click()
            expect(row).to_contain_text("cancelled")
            hub.stalls.clear()
    expect(row).to_contain_text("succeeded")
    card = page.locator("article", has=page.get_by_role("heading", name="tiny"))
    card.get_by_role("button", name="Remove tiny").click()
    page.get_by_role("dialog").get_by_role("button", name="Remove").click()
    expect(card).to_have_count(0)


def test_a_batch_is_created_and_its_results_downloaded(tmp_path: Path, open_page: OpenPage) -> None:
    file = tmp_path / "requests.jsonl"
    body = {"model": "chat-demo", "messages": [{"role": "user", "content": "hello"}]}
    lines = [{"custom_id": str(n), "method": "POST", "url": "/v1/chat/completions", "body": body} for n in range(3)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = open_page("/console/batches")
    page.get_by_label("Requests (JSONL)").set_input_files(file)
    page.get_by_role("button", name="Create batch").click()
    expect(page.locator(".batch .badge").first).to_have_text("completed")
    with page.expect_download() as download:
        page.get_by_role("link", name="Results").click()
    assert len(Path(download.value.path()).read_text().splitlines()) == 3


def test_a_key_is_created_limited_and_revoked(console: Stack, open_page: OpenPage) -> None:
    page = open_page("/console/keys")
    page.get_by_role("button", name="Create a key").click()
    page.get_by_label("Name").fill("chat")
    page.get_by_role("button", name="Create", exact=True).click()
    text = page.locator("[data-secret-text]")
    expect(text).to_contain_text("mlxq_")
    store = KeyStore(console.settings.keys_file)
    assert store.find(text.inner_text()) is not None
    page.get_by_role("button", name="Close").click()
    row = page.locator("tr", has_text="chat")
    row.get_by_role("button", name="Limits of chat").click()
    page.get_by_role("dialog").get_by_label("Requests").fill("7/minute")
    page.get_by_role("button", name="Save").click()
    expect(row).to_contain_text("7/minute")
    row.get_by_role("button", name="Revoke chat").click()
    page.get_by_role("dialog").get_by_role("button", name="Revoke").click()
    expect(row).to_contain_text("revoked")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_violation(console: Stack, open_page: OpenPage, scheme: str) -> None:
    with console.client() as client:
        body = {"prompt": "fail please", "metadata": {"run": "nine"}}
        job = client.request("POST", "/v1/jobs", json=body, headers={"Prefer": "wait=20"}).json()
    page = open_page("/console/sign-in", signed_in=False, color_scheme=scheme)
    found = {"sign-in": violations(page)}
    page = open_page("/", color_scheme=scheme)
    for path in (*PATHS, f"/console/jobs/{job['id']}", "/console/jobs/job_unknown"):
        page.goto(path)
        expect(page.get_by_role("heading", level=1)).to_be_visible()
        found[path] = violations(page)
    page.set_viewport_size(PHONE)
    page.goto("/console/jobs")
    page.get_by_role("button", name="Menu").click()
    found["phone"] = violations(page)
    assert {path: each for path, each in found.items() if each} == {}


def test_the_theme_is_remembered_and_the_menu_opens_on_a_phone(open_page: OpenPage) -> None:
    page = open_page("/", viewport=PHONE)
    page.get_by_role("button", name="Menu").click()
    page.get_by_label("Theme").select_option("dark")
    page.reload()
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.long
def test_an_image_reaches_the_vision_model(console: Stack, open_page: OpenPage) -> None:
    start_vision_worker(console)
    page = open_page("/console/playground")
    page.locator("select[name=model]").select_option("ui-micro")
    page.locator("[data-images]").set_input_files("docs/images/page.png")
    expect(page.get_by_alt_text("Attached image 1")).to_be_visible()
    ask(page, "Click the first button")
    expect(page.locator(".turn-assistant .turn-text").last).to_contain_text("click(")
    expect(page.locator(".turn-user img")).to_be_visible()
    page.get_by_role("link", name="job", exact=True).click()
    expect(page.get_by_text("The request is no longer stored.")).to_be_visible()


def test_a_key_without_admin_sees_only_its_own_jobs(console: Stack, open_page: OpenPage) -> None:
    store = KeyStore(console.settings.keys_file)
    key = store.create("visitor", {"infer"})
    page = open_page("/console/jobs", key=key)
    expect(page.get_by_text("No jobs found")).to_be_visible()
    page.goto("/console/models")
    expect(page.get_by_role("button", name="Load")).to_have_count(0)
    store.revoke("visitor")
    eventually(lambda: "sign-in" in (page.goto("/") or page).url, "the session ends with its key")
