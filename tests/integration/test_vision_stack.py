"""Images in the whole stack: HTTP, Redis, queue, worker and stream."""

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
from shared.redis import keys
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


def body_of(text: str, *images: bytes, **more: Any) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    content = [*parts, {"type": "text", "text": text}] if parts else text
    return {"messages": [{"role": "user", "content": content}], "max_tokens": TOKENS, "temperature": 0, **more}


def run(stack: Stack, body: dict[str, Any]) -> RemoteJob:
    with stack.client() as client:
        job = client.submit(body, wait_s=60)
        while not job.status.terminal:
            job = client.job(job.id, wait_s=60)
        return job


def mixed() -> list[tuple[str, list[bytes]]]:
    """Return sixteen questions with none to three images."""
    sizes = ((300, 200), (64, 480), (640, 480), (56, 56))
    return [(f"Question {n}?", [picture(*sizes[(n + i) % 4], seed=n // 2) for i in range(n % 4)]) for n in range(16)]


@pytest.fixture(scope="module")
def reference(tiny_vision_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, list[bytes]], str]:
    """Return a function that generates greedily with mlx-vlm."""
    from mlx_vlm import generate, load
    from mlx_vlm.prompt_utils import apply_chat_template

    model, processor = load(str(tiny_vision_path))
    folder = tmp_path_factory.mktemp("pictures")

    def generate_text(text: str, images: list[bytes]) -> str:
        paths = [folder / f"{digest(image)}.png" for image in images]
        for path, image in zip(paths, images, strict=True):
            path.write_bytes(image)
        prompt = apply_chat_template(processor, model.config, text, num_images=len(paths))
        files = [str(path) for path in paths] or None
        return str(generate(model, processor, prompt, image=files, max_tokens=TOKENS, temperature=0.0).text)

    return generate_text


def test_sixteen_simultaneous_jobs_give_the_texts_of_mlx_vlm(
    vision_stack: Stack, reference: Callable[[str, list[bytes]], str]
) -> None:
    questions = mixed()
    with ThreadPoolExecutor(16) as pool:
        jobs = list(pool.map(lambda question: run(vision_stack, body_of(question[0], *question[1])), questions))
    assert {job.status for job in jobs} == {Status.SUCCEEDED}
    assert [job.text for job in jobs] == [reference(*question) for question in questions]


def test_all_ways_to_send_an_image_give_the_same_text(vision_stack: Stack, http: httpx2.Client) -> None:
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
    other = run(vision_stack, body_of("What?", picture(seed=2)))
    assert other.text not in texts, "the text does not depend on the image"


def test_an_image_is_stored_apart_from_the_record_never_logged_and_deleted_with_its_job(vision_stack: Stack) -> None:
    image = picture(seed=77)
    body = data_url(image).partition(",")[2]
    with vision_stack.client() as client:
        job = client.submit(body_of("What is it?", image, deadline_s=500) | {"max_tokens": 5000})
        name = keys.IMAGES + job.id
        assert vision_stack.redis.hkeys(name) == [digest(image)]
        assert 500 < vision_stack.redis.ttl(name) <= 500 + SLACK_S
        record = vision_stack.redis.hgetall(keys.JOB + job.id)
        request = vision_stack.redis.hget(keys.REQUEST + job.id, "request")
        assert digest(image) in request
        assert body[:60] not in json.dumps(record) + request
        client.cancel(job.id)
        eventually(lambda: client.job(job.id).status.terminal, "the job ends", 10)
    assert not vision_stack.redis.exists(name)
    done = run(vision_stack, body_of("What is it?", image))
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
def test_a_refused_image_is_named_and_leaves_no_data(
    vision_stack: Stack, http: httpx2.Client, image: bytes, status: int, code: str
) -> None:
    def stored() -> set[str]:
        return {*vision_stack.redis.scan_iter(f"{keys.IMAGES}*"), *vision_stack.redis.scan_iter(f"{keys.JOB}*")}

    before = stored()
    answer = http.post("/v1/jobs", json=body_of("?", picture(seed=500), image))
    problem = answer.json()
    assert (answer.status_code, problem["code"], problem["field"]) == (status, code, "messages[0].content[1]")
    form = {"request": json.dumps({"prompt": "?"})}
    answer = http.post("/v1/jobs", data=form, files=[("images", ("a.png", image))])
    assert (answer.status_code, answer.json()["field"]) == (status, "images[0]")
    assert stored() == before


@pytest.mark.parametrize(
    ("data", "files", "field"),
    [
        ({}, [("images", ("a", PNG))], "request"),
        ({"request": "{}", "other": "1"}, [("images", ("a", PNG))], "other"),
        ({"request": '{"prompt": "?"}'}, [("image", ("a", PNG))], "image"),
        ({"request": '{"prompt": 7}'}, [("images", ("a", PNG))], "prompt"),
    ],
)
def test_an_invalid_form_is_refused_with_the_name_of_the_field(
    http: httpx2.Client, data: dict[str, str], files: list[Any], field: str
) -> None:
    answer = http.post("/v1/jobs", data=data, files=files)
    assert (answer.status_code, answer.json()["field"]) == (422, field)


def test_an_idempotency_key_matches_an_image_regardless_of_how_it_is_sent(http: httpx2.Client) -> None:
    key = {"Idempotency-Key": "one-picture"}
    first = http.post("/v1/jobs", json=body_of("What?", PNG), headers=key).raise_for_status().json()
    part = {"type": "image", "image": data_url(PNG, "image/webp")}
    again = body_of("What?") | {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}]}
    assert http.post("/v1/jobs", json=again, headers=key).raise_for_status().json()["id"] == first["id"]
    other = http.post("/v1/jobs", json=body_of("What?", picture(seed=3)), headers=key)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")


@pytest.mark.parametrize("more", [pytest.param({}, marks=pytest.mark.long), {"temperature": 0.9, "seed": 5}])
def test_a_stream_continues_after_its_worker_was_killed(vision_api: Stack, more: dict[str, Any]) -> None:
    worker = vision_api.start_worker()
    body = body_of("Tell me everything.", picture(640, 480, seed=4), picture(seed=5), **more) | {"max_tokens": 250}
    reference = run(vision_api, body)
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
    assert "".join(texts) == reference.text


def test_a_cancelled_job_with_an_image_frees_its_slot(vision_stack: Stack) -> None:
    with vision_stack.client() as client:
        job = client.submit(body_of("Go on and on.", picture(640, 480, seed=9)) | {"max_tokens": 5000})
        eventually(lambda: client.job(job.id).status is Status.RUNNING, "the job runs", 30)
        client.cancel(job.id)
        eventually(lambda: client.job(job.id).status is Status.CANCELLED, "the job is cancelled", 10)
        eventually(lambda: vision_stack.slots_used() == 0, "the slot is free", 10)


def test_a_job_with_a_lost_image_fails_with_a_specific_code(vision_api: Stack) -> None:
    image = picture(seed=6)
    with Client(vision_api.url, vision_api.key) as client:
        job = client.submit(body_of("What?", image))
        assert vision_api.redis.delete(keys.IMAGES + job.id) == 1
        vision_api.start_worker()
        eventually(lambda: client.job(job.id).status is Status.FAILED, "the job fails", 30)
        assert client.request("GET", f"/v1/jobs/{job.id}").json()["error"]["code"] == "image_lost"


def test_an_answer_without_actions_succeeds_with_a_parse_error(http: httpx2.Client) -> None:
    body = body_of("Click it.", PNG, parse="ui_tars")
    job = http.post("/v1/jobs", json=body, headers={"Prefer": "wait=60"}).raise_for_status().json()
    assert (job["status"], job["actions"]) == ("succeeded", [])
    assert job["parse_error"]
    answer = http.post("/inference", json=body).raise_for_status().json()
    assert (answer["actions"], answer["parse_error"]) == ([], job["parse_error"])
    unparsed = http.post("/inference", json=body_of("Click it.", PNG)).raise_for_status().json()
    assert not {"actions", "parse_error"} & set(unparsed)


def test_a_restarted_worker_reuses_prefixes_with_images_from_disk(vision_api: Stack) -> None:
    worker = vision_api.start_worker()
    body = body_of("What is it?", picture(640, 480, seed=8))
    first = run(vision_api, body)
    vision_api.stop(worker)
    vision_api.start_worker()
    again = run(vision_api, body)
    assert again.text == first.text
    assert again.usage["cached_tokens"] >= 256
