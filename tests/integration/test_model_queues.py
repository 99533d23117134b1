"""Several models of a worker and the queues of their tickets, with made-up models that load and speak as ordered."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from shared.jobs import Status
from shared.tickets import make_app, queue_name
from tests.plugins.stack import Stack, catalog_stack
from tests.support.admin import Admin
from tests.support.waiting import eventually

MIB = 2**20
SIZE = 20 * MIB
SLOW = "!pause=0.02"


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Admin]]:
    """Makes an operator of a stack without workers, for made-up models: name → orders for its loading."""
    with ExitStack() as exits:

        def made(models: dict[str, str], **variables: str) -> Admin:
            lines = [f'default = "{next(iter(models))}"']
            for name, orders in models.items():
                folder = tmp_path / name
                folder.mkdir()
                (folder / "config.json").write_text(f'{{"orders": "{orders}"}}')
                with (folder / "model.safetensors").open("wb") as weights:
                    weights.truncate(SIZE)
                lines += [f"[models.{name}]", f'path = "{folder}"']
            given = {"BACKEND": "fake", **variables}
            stack = exits.enter_context(catalog_stack("\n".join(lines), **given))
            operator = Admin(stack)
            exits.callback(operator.http.close)
            return operator

        yield made


def consumed(stack: Stack) -> set[str]:
    """The queues that workers consume."""
    told = make_app(stack.settings).control.inspect(timeout=5).active_queues() or {}
    return {queue["name"] for queues in told.values() for queue in queues}


def waiting_tickets(stack: Stack, model: str) -> int:
    return int(stack.redis.llen(queue_name(model)))


def test_tickets_of_a_full_model_are_left_in_line_while_another_model_takes_its_own(
    make: Callable[..., Admin],
) -> None:
    operator = make({"one": "", "two": "", "three": ""}, SLOTS="2", WORKER_MODELS="one,two", DRAIN_S="0")
    stack = operator.stack
    stack.start_worker()
    with stack.client() as client:
        full = [client.submit({"model": "one", "prompt": f"{SLOW} {i}", "max_tokens": 4000}) for i in range(7)]
        eventually(lambda: stack.slots_used() == 2, "the first model is full")
        others = [client.submit({"model": "two", "prompt": f"{i}", "max_tokens": 5}) for i in range(9)]
        eventually(lambda: all(client.job(job.id).status is Status.SUCCEEDED for job in others), "the others end")
        assert waiting_tickets(stack, "one") == 5
        for job in full[:2]:
            client.cancel(job.id)
        eventually(lambda: waiting_tickets(stack, "one") == 3, "whoever is next is started")
        for job in full[2:]:
            client.cancel(job.id)
        eventually(lambda: waiting_tickets(stack, "one") == 0, "all tickets are used up")


def test_another_worker_takes_the_tickets_of_a_model_that_is_full_here(make: Callable[..., Admin]) -> None:
    operator = make({"one": "", "two": "", "three": ""}, SLOTS="2", WORKER_MODELS="one", DRAIN_S="0")
    stack = operator.stack
    for _ in range(2):
        stack.start_worker()
    with stack.client() as client:
        jobs = [client.submit({"model": "one", "prompt": f"{SLOW} {i}", "max_tokens": 4000}) for i in range(7)]
        eventually(lambda: stack.slots_used() == 4, "both are full")
        assert {worker.slots_used for worker in stack.ready_workers()} == {2}
        assert waiting_tickets(stack, "one") == 3
        for job in jobs:
            client.cancel(job.id)


def test_the_queues_of_a_model_are_consumed_as_often_as_it_is_warm_and_only_then(make: Callable[..., Admin]) -> None:
    operator = make({"one": "", "two": ""}, LOAD_ON_DEMAND="false")
    stack = operator.stack
    stack.start_worker()
    node = eventually(stack.registry.hosts, "the worker can be asked")[0].node
    always = {"mlxq.one", f"mlxq.one@{node}"}
    two = {"mlxq.two", f"mlxq.two@{node}"}
    assert consumed(stack) == always
    for _ in range(2):
        assert operator.ask("load", "two")["state"] == "succeeded"
        eventually(lambda: consumed(stack) == always | two, "it is consumed")
        assert operator.say("two").status_code == 200
        assert operator.ask("unload", "two")["state"] == "succeeded"
        eventually(lambda: consumed(stack) == always, "it is not any more")
