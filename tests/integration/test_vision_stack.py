"""Images through the whole stack: HTTP, Redis, queue, worker, stream."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest

from scripts.client.api import Client, RemoteJob
from shared.jobs.images import SLACK_S, digest
from shared.jobs.log import EventKind
from shared.jobs.record import Status
from shared.queue import keys
from tests.plugins.stack import Stack
from tests.support.image_files import data_url, picture
from tests.support.waiting import eventually

pytest.importorskip("mlx_vlm")

TOKENS = 24
PNG = picture()


@pytest.fixture
def http(vision_stack: Stack) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=vision_stack.url, headers={"X-API-Key": vision_stack.key}, timeout=60) as client:
        yield client


def asked(text: str, *images: bytes, **more: Any) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    content = [*parts, {"type": "text", "text": text}] if parts else text
    return {"messages": [{"role": "user", "content": content}], "max_tokens": TOKENS, "temperature": 0, **more}


def finished(stack: Stack, body: dict[str, Any]) -> RemoteJob:
    with stack.client() as client:
        job = client.submit(body, wait_s=60)
        while not job.status.terminal:
            job = client.job(job.id, wait_s=60)
        return job


def mixed() -> list[tuple[str, list[bytes]]]:
    """Sixteen questions, a quarter of them without an image."""
    sizes = ((300, 200), (64, 480), (640, 480), (56, 56))
    return [(f"Question {n}?", [picture(*sizes[(n + i) % 4], seed=n // 2) for i in range(n % 4)]) for n in range(16)]


@pytest.fixture(scope="module")
def reference(tiny_vision_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, list[bytes]], str]:
    """mlx-vlm's own `generate`, greedy."""
    from mlx_vlm import generate, load
    from mlx_vlm.prompt_utils import apply_chat_template

    model, processor = load(str(tiny_vision_path))
    folder = tmp_path_factory.mktemp("pictures")

    def say(text: str, images: list[bytes]) -> str:
        paths = [folder / f"{digest(image)}.png" for image in images]
        for path, image in zip(paths, images, strict=True):
            path.write_bytes(image)
        prompt = apply_chat_template(processor, model.config, text, num_images=len(paths))
        shown = [str(path) for path in paths] or None
        return str(generate(model, processor, prompt, image=shown, max_tokens=TOKENS, temperature=0.0).text)

    return say


def test_sixteen_at_once_say_what_mlx_vlm_says(
    vision_stack: Stack, reference: Callable[[str, list[bytes]], str]
) -> None:
    questions = mixed()
    with ThreadPoolExecutor(16) as pool:
        jobs = list(pool.map(lambda question: finished(vision_stack, asked(question[0], *question[1])), questions))
    assert {job.status for job in jobs} == {Status.SUCCEEDED}
    assert [job.text for job in jobs] == [reference(*question) for question in questions]


def test_every_way_to_send_an_image_is_the_same_request(vision_stack: Stack, http: httpx2.Client) -> None:
    url, settings = data_url(PNG), {"max_tokens": TOKENS, "temperature": 0}
    parts = [
        [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What?"}],
        [{"type": "image", "image": url}, {"type": "text", "text": "What?"}],
    ]
    bodies: list[dict[str, Any]] = [{"messages": [{"role": "user", "content": each}], **settings} for each in parts]
    bodies.append({"prompt": "What?", "images": [url], **settings})
    texts = {http.post("/inference", json=body).raise_for_status().json()["text"] for body in bodies}
    form = {"request": json.dumps({"prompt": "What?", **settings})}
    upload = http.post("/inference", data=form, files=[("images", ("a.png", PNG, "image/png"))])
    texts.add(upload.raise_for_status().json()["text"])
    job = http.post("/v1/jobs", data=form, files=[("images", ("a.png", PNG))], headers={"Prefer": "wait=60"})
    texts.add(job.raise_for_status().json()["output"]["text"])
    assert len(texts) == 1
    other = finished(vision_stack, asked("What?", picture(seed=2)))
    assert other.text not in texts, "the image makes a difference"


def test_an_image_is_neither_in_the_record_nor_in_a_log_and_goes_with_its_job(vision_stack: Stack) -> None:
    image = picture(seed=77)
    body = data_url(image).partition(",")[2]
    with vision_stack.client() as client:
        job = client.submit(asked("What is it?", image, deadline_s=500) | {"max_tokens": 5000})
        name = keys.IMAGES + job.id
        assert vision_stack.redis.hkeys(name) == [digest(image)]
        assert 500 < vision_stack.redis.ttl(name) <= 500 + SLACK_S
        record = vision_stack.redis.hgetall(keys.JOB + job.id)
        request = vision_stack.redis.hget(keys.REQUEST + job.id, "request")
        assert digest(image) in request
        assert body[:60] not in json.dumps(record) + request
        client.cancel(job.id)
        eventually(lambda: client.job(job.id).status.terminal, "it ends", 10)
    assert not vision_stack.redis.exists(name)
    done = finished(vision_stack, asked("What is it?", image))
    assert not vision_stack.redis.exists(keys.IMAGES + done.id)
    logs = "".join(vision_stack.log(each) for each in ("web", "worker-0"))
    assert job.id in logs
    for secret in (body[:60], body[300:360], repr(image[:20])[2:-1]):
        assert secret not in logs


@pytest.mark.parametrize(
    ("image", "status", "code"),
    [
        (b"nothing", 422, "image_format"), (PNG[:150], 422, "image_broken"),
        (bytes(11 * 2**20), 413, "image_too_large"),
    ],
)  # fmt: skip
def test_what_is_refused_is_named_and_leaves_nothing(
    vision_stack: Stack, http: httpx2.Client, image: bytes, status: int, code: str
) -> None:
    def held() -> set[str]:
        return {*vision_stack.redis.scan_iter(f"{keys.IMAGES}*"), *vision_stack.redis.scan_iter(f"{keys.JOB}*")}

    before = held()
    answer = http.post("/v1/jobs", json=asked("?", picture(seed=500), image))
    problem = answer.json()
    assert (answer.status_code, problem["code"], problem["field"]) == (status, code, "messages[0].content[1]")
    form = {"request": json.dumps({"prompt": "?"})}
    answer = http.post("/v1/jobs", data=form, files=[("images", ("a.png", image))])
    assert (answer.status_code, answer.json()["field"]) == (status, "images[0]")
    assert held() == before


@pytest.mark.parametrize(
    ("data", "files", "field"),
    [
        ({}, [("images", ("a", PNG))], "request"),
        ({"request": "{}", "other": "1"}, [("images", ("a", PNG))], "other"),
        ({"request": '{"prompt": "?"}'}, [("image", ("a", PNG))], "image"),
        ({"request": '{"prompt": 7}'}, [("images", ("a", PNG))], "prompt"),
    ],
)
def test_a_form_that_does_not_fit_is_told_by_its_field(
    http: httpx2.Client, data: dict[str, str], files: list[Any], field: str
) -> None:
    answer = http.post("/v1/jobs", data=data, files=files)
    assert (answer.status_code, answer.json()["field"]) == (422, field)


def test_an_idempotency_key_knows_an_image_however_it_is_sent(http: httpx2.Client) -> None:
    key = {"Idempotency-Key": "one-picture"}
    first = http.post("/v1/jobs", json=asked("What?", PNG), headers=key).raise_for_status().json()
    part = {"type": "image", "image": data_url(PNG, "image/webp")}
    again = asked("What?") | {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}]}
    assert http.post("/v1/jobs", json=again, headers=key).raise_for_status().json()["id"] == first["id"]
    other = http.post("/v1/jobs", json=asked("What?", picture(seed=3)), headers=key)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")


@pytest.mark.parametrize("more", [{}, {"temperature": 0.9, "seed": 5}])
def test_a_stream_goes_on_after_its_worker_was_killed(vision_api: Stack, more: dict[str, Any]) -> None:
    worker = vision_api.start_worker()
    body = asked("Tell me everything.", picture(640, 480, seed=4), picture(seed=5), **more) | {"max_tokens": 400}
    undisturbed = finished(vision_api, body)
    with vision_api.client() as client:
        job = client.submit(body)
        texts, resumed = [], False
        for number, event in enumerate(client.events(job.id)):
            if event.kind is EventKind.CHUNK:
                texts.append(json.loads(event.data)["text"])
            resumed |= event.kind is EventKind.RESUMED
            if number == 20:
                worker.send_signal(signal.SIGKILL)
                worker.wait(10)
                vision_api.start_worker()
        assert client.job(job.id).status is Status.SUCCEEDED
    assert resumed
    assert "".join(texts) == undisturbed.text


def test_a_cancelled_image_frees_its_slot(vision_stack: Stack) -> None:
    with vision_stack.client() as client:
        job = client.submit(asked("Go on and on.", picture(640, 480, seed=9)) | {"max_tokens": 5000})
        eventually(lambda: client.job(job.id).status is Status.RUNNING, "it runs", 30)
        client.cancel(job.id)
        eventually(lambda: client.job(job.id).status is Status.CANCELLED, "it is cancelled", 10)
        eventually(lambda: vision_stack.slots_used() == 0, "its slot is free", 10)


def test_an_image_that_is_gone_fails_its_job_with_its_reason(vision_api: Stack) -> None:
    image = picture(seed=6)
    with Client(vision_api.url, vision_api.key) as client:
        job = client.submit(asked("What?", image))
        assert vision_api.redis.delete(keys.IMAGES + job.id) == 1
        vision_api.start_worker()
        eventually(lambda: client.job(job.id).status is Status.FAILED, "it fails", 30)
        assert client.request("GET", f"/v1/jobs/{job.id}").json()["error"]["code"] == "image_lost"


def test_an_answer_without_actions_says_so_and_succeeds(http: httpx2.Client) -> None:
    body = asked("Click it.", PNG, parse="ui_tars")
    job = http.post("/v1/jobs", json=body, headers={"Prefer": "wait=60"}).raise_for_status().json()
    assert (job["status"], job["actions"]) == ("succeeded", [])
    assert job["parse_error"]
    answer = http.post("/inference", json=body).raise_for_status().json()
    assert (answer["actions"], answer["parse_error"]) == ([], job["parse_error"])
    unasked = http.post("/inference", json=asked("Click it.", PNG)).raise_for_status().json()
    assert (unasked["actions"], unasked["parse_error"]) == (None, None)


def test_a_restarted_worker_finds_the_images_it_has_read_on_disk(vision_api: Stack) -> None:
    worker = vision_api.start_worker()
    body = asked("What is it?", picture(640, 480, seed=8))
    first = finished(vision_api, body)
    vision_api.stop(worker)
    vision_api.start_worker()
    again = finished(vision_api, body)
    assert again.text == first.text
    assert again.usage["cached_tokens"] >= 256
