"""SmolLM2 in the whole stack: HTTP, queue, worker, engine, log and stream."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest

from scripts.client.api import RemoteJob
from shared.jobs.log import EventKind
from shared.jobs.record import Status
from tests.plugins.stack import Stack
from tests.support.waiting import eventually

T = TypeVar("T")
QUESTIONS = (
    "What is the capital of France?",
    "Name three colours.",
    "How many legs has a spider?",
    "Write one sentence about the sea.",
    "What is 12 times 3?",
    "Who wrote Hamlet?",
    "Translate 'good morning' into French.",
    "Why is the sky blue? 🌤",
)


def at_once(calls: Iterable[Callable[[], T]]) -> list[T]:
    """Run all calls at the same time, each on its own thread."""
    calls = list(calls)
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def chat(question: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}], "temperature": 0, **more}


def run(stack: Stack, body: dict[str, Any]) -> RemoteJob:
    with stack.client() as client:
        job = client.submit(body, wait_s=60)
        while not job.status.terminal:
            job = client.job(job.id, wait_s=60)
        return job


def test_a_greedy_answer_is_correct_and_has_usage_and_timings(smollm2_stack: Stack) -> None:
    with smollm2_stack.client() as client:
        answer = client.request(
            "POST", "/inference", json=chat("What is the capital of France?", max_tokens=32), wait_s=60
        )
    body = answer.json()
    assert "Paris" in body["text"]
    assert body["finish_reason"] == "stop"
    assert body["usage"]["prompt_tokens"] > 10
    assert 0 <= body["timings"]["queue_s"] <= body["timings"]["first_token_s"] <= body["timings"]["total_s"]


def test_a_prompt_goes_through_the_chat_template_unless_raw_is_set(smollm2_stack: Stack) -> None:
    question = {"prompt": "What is the capital of France?", "temperature": 0, "max_tokens": 32}
    with smollm2_stack.client() as client:
        job = client.request("POST", "/v1/jobs", json=question, wait_s=60, headers={"Prefer": "wait=60"}).json()
        templated = client.request("POST", "/inference", json=question, wait_s=60).json()
        raw = client.request("POST", "/inference", json={**question, "raw": True}, wait_s=60).json()
    assert "Paris" in templated["text"]
    assert job["output"]["text"] == templated["text"]
    assert templated["usage"]["prompt_tokens"] > raw["usage"]["prompt_tokens"]


@pytest.fixture(scope="module")
def reference(smollm2_path: Path) -> Callable[[str, int], str]:
    """Return a function that generates greedily with mlx-lm."""
    from shared.blas import prefer_openblas

    prefer_openblas()
    import mlx_lm

    model, tokenizer = mlx_lm.load(str(smollm2_path))[:2]

    def generate(question: str, tokens: int) -> str:
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
        return str(mlx_lm.generate(model, tokenizer, prompt, max_tokens=tokens))

    return generate


def test_eight_simultaneous_greedy_jobs_give_the_texts_of_mlx_lm(
    smollm2_stack: Stack, reference: Callable[[str, int], str]
) -> None:
    jobs = at_once(lambda q=q: run(smollm2_stack, chat(q, max_tokens=12)) for q in QUESTIONS)  # type: ignore[misc]
    assert [job.text for job in jobs] == [reference(q, 12) for q in QUESTIONS]


def test_a_seed_gives_the_same_text_with_and_without_other_jobs(smollm2_stack: Stack) -> None:
    seeded = chat("Tell me a story.", max_tokens=16, temperature=1.0, top_p=0.9, seed=7)
    single = run(smollm2_stack, seeded)
    others = [chat(q, max_tokens=10 + i, temperature=0.7, seed=i) for i, q in enumerate(QUESTIONS)]
    together = at_once(lambda b=b: run(smollm2_stack, b) for b in [seeded, *others])  # type: ignore[misc]
    assert together[0].text == single.text
    assert run(smollm2_stack, {**seeded, "seed": 8}).text != single.text


def test_a_stop_string_ends_the_text_and_is_never_streamed(
    smollm2_stack: Stack, reference: Callable[[str, int], str]
) -> None:
    full = reference(QUESTIONS[3], 40)
    stop = full[len(full) // 2 : len(full) // 2 + 6]
    with smollm2_stack.client() as client:
        job = client.submit(chat(QUESTIONS[3], max_tokens=40, stop=[stop]))
        text = "".join(event.text for event in client.events(job.id))
        job = client.job(job.id)
    assert text == job.text == full[: full.index(stop)]
    assert job.finish_reason == "stop"


def test_streams_opened_at_random_moments_get_the_whole_text(smollm2_stack: Stack) -> None:
    draw = random.Random(5)
    with smollm2_stack.client() as client:
        jobs = [
            client.submit(chat(draw.choice(QUESTIONS), max_tokens=draw.randint(5, 24), temperature=0.8, seed=n)).id
            for n in range(12)
        ]
        readers = [job for job in jobs for _ in range(3)]

        def read(job_id: str, delay: float) -> tuple[str, list[int], str]:
            threading.Event().wait(delay)
            events = list(client.events(job_id))
            return job_id, [event.n for event in events], "".join(event.text for event in events)

        streams = at_once(lambda j=j: read(j, draw.uniform(0, 3)) for j in readers)  # type: ignore[misc]
        texts = {job_id: client.job(job_id).text for job_id in jobs}
    assert all(text == texts[job_id] for job_id, _, text in streams)
    assert all(numbers == list(range(1, len(numbers) + 1)) for _, numbers, _ in streams)


def test_a_stream_can_be_read_from_any_cursor(smollm2_stack: Stack) -> None:
    with smollm2_stack.client() as client:
        job = client.submit(chat("Name three colours.", max_tokens=20))
        whole = list(client.events(job.id))
        assert whole[-1].kind is EventKind.DONE
        for cursor in range(len(whole) + 1):
            # There is no stream to open after the last event.
            rest = list(client.events(job.id, after=cursor)) if cursor < len(whole) else []
            assert [(e.n, e.kind, e.text) for e in rest] == [(e.n, e.kind, e.text) for e in whole[cursor:]]


def test_a_cancelled_job_frees_its_slot_and_keeps_its_text(smollm2_stack: Stack) -> None:
    with smollm2_stack.client() as client:
        job = client.submit(chat("Count from 1 to 1000.", max_tokens=2000))
        events = client.events(job.id)
        seen = [next(events) for _ in range(6)]
        client.cancel(job.id)
        seen += list(events)
        cancelled = client.job(job.id)
    assert cancelled.status is Status.CANCELLED
    assert cancelled.text == "".join(event.text for event in seen)
    eventually(lambda: smollm2_stack.slots_used() == 0, "the slot is free")


def test_penalties_and_filters_apply_only_to_their_job(
    smollm2_stack: Stack, reference: Callable[[str, int], str]
) -> None:
    bodies = [
        chat(QUESTIONS[0], max_tokens=24),
        chat(QUESTIONS[0], max_tokens=24, repetition_penalty=1.8),
        chat(QUESTIONS[0], max_tokens=24, temperature=1.5, top_k=1, seed=3),
        chat(QUESTIONS[0], max_tokens=24, temperature=1.2, min_p=1.0, seed=4),
    ]
    plain, penalised, top_one, min_one = at_once(lambda b=b: run(smollm2_stack, b) for b in bodies)  # type: ignore[misc]
    assert plain.text == top_one.text == min_one.text == reference(QUESTIONS[0], 24)
    assert penalised.status is Status.SUCCEEDED


def test_a_job_with_a_raw_prompt_continues_the_prompt(smollm2_stack: Stack) -> None:
    prompt = "The days of the week are Monday, Tuesday,"
    job = run(smollm2_stack, {"prompt": prompt, "raw": True, "temperature": 0, "max_tokens": 12})
    assert "Wednesday" in job.text
    assert job.usage["completion_tokens"] <= 12
