"""Stored responses, and the conversations that they form."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from typing import Any, Final, Self

from shared.errors import Conflict, Gone, Invalid, NotFound
from shared.jobs.log import Event, EventKind, JobLog
from shared.jobs.record import Job
from shared.jobs.store import Jobs
from shared.redis import keys
from shared.redis.client import Redis
from shared.wire import known_fields, to_json
from web.http.threadpool import run_in_threadpool
from web.responses.events import ResponseEvents
from web.responses.items import ITEMS, MAX_ITEMS, Item, ItemReference
from web.responses.output import Shown
from web.responses.requests import ENCRYPTED, CustomTool, ResponseRequest
from web.responses.store import ResponseStore
from web.responses.view import ResponseView, echoed_fields, job_id, status_of, view

MAX_TURNS: Final = 1000
"""Maximum responses of a conversation."""
MAX_BYTES: Final = 256 * 2**20
"""Maximum size of the stored parts of a prompt: more than all images that a request may have."""
_RESPONSE_ID: Final = re.compile(r"resp_[0-9a-f]{28}")
_ITEM_ID: Final = re.compile(r"[a-z]+_([0-9a-f]{28})_\d+")
_PREVIOUS: Final = "previous_response_id"
_PAGE: Final = 500
_OUTPUTS_KEPT: Final = 16
"""Responses kept in memory while references are resolved: successive ones are usually to the same response."""
_NO_EVENTS: Final = "The events of the response are no longer stored. GET it without stream."


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """The request of a stored response, and its answer.

    Attributes:
        owner: id of the API key.
        items: the input of this response, as `input_items` lists it.
        echoed: see `web.responses.view.echoed_fields`.
        shown: what the output contains; fields of `Shown`.
        answer: the response after its end; None until it is stored.
        size: bytes of the stored JSON.
    """

    id: str
    owner: str
    items: list[dict[str, Any]]
    echoed: dict[str, Any]
    shown: Shown
    answer: dict[str, Any] | None = field(default=None, compare=False)
    size: int = field(default=0, compare=False)

    @classmethod
    def of(cls, request: ResponseRequest, owner: str) -> Self:
        """Return a response that has no id and no items yet."""
        shown = Shown(
            custom_tools=frozenset(tool.name for tool in request.tools if isinstance(tool, CustomTool)),
            summary=bool(request.reasoning.summary or request.reasoning.generate_summary),
            encrypted=ENCRYPTED in request.include,
            logprobs=request.logprobs is not None,
        )
        return cls("", owner, [], echoed_fields(request), shown)

    @property
    def previous(self) -> str | None:
        """Id of the response that this one continues."""
        previous: str | None = self.echoed[_PREVIOUS]
        return previous

    def request_json(self) -> str:
        """Return everything but the answer as JSON."""
        shown = {**asdict(self.shown), "custom_tools": sorted(self.shown.custom_tools)}
        return to_json({"id": self.id, "items": self.items, "echoed": self.echoed, "shown": shown})

    @classmethod
    def from_json(cls, owner: str, request: str, answer: str | None) -> Self:
        """Parse a stored response, also one of another version."""
        data = json.loads(request)
        shown = known_fields(Shown, data["shown"])
        shown["custom_tools"] = frozenset(shown["custom_tools"])
        parsed = None if answer is None else json.loads(answer)
        size = len(request) + len(answer or "")
        return cls(data["id"], owner, data["items"], data["echoed"], Shown(**shown), parsed, size)


class Responses:
    """The stored responses of all API keys. Methods raise `redis.RedisError` if Redis is unreachable."""

    def __init__(self, client: Redis, store: ResponseStore, jobs: Jobs, log: JobLog) -> None:
        self._client = client
        self._store = store
        self._jobs = jobs
        self._log = log

    def begin(self, response: StoredResponse) -> None:
        """Store a response before its job is accepted. When this returns, it is durable.

        Raises:
            Unavailable: the disk is full.
        """
        self._client.zadd(keys.UNANSWERED, {f"{response.owner} {response.id}": time.time()})
        self._store.put(response.owner, response.id, response.request_json())

    def unanswered(self) -> list[tuple[str, str, float]]:
        """Return key id, response id and creation time of all responses whose answers are not stored, oldest first."""
        waiting = self._client.zrange(keys.UNANSWERED, 0, -1, withscores=True)
        return [(*member.split(" ", 1), at) for member, at in waiting]

    def store_answer(self, response_id: str, owner: str) -> bool:
        """Store the answer of a response whose job has ended, unless it already is or cannot be any more.

        Returns:
            False if there will never be an answer, because the job or its log does not exist.

        Raises:
            Unavailable: the disk is full.
        """
        try:
            response = self.get(response_id, owner)
            if response.answer is None:
                job = self.job(response)
                if not job.status.terminal:  # a failover of Redis has lost its end: it ends again
                    return True
                self._store.put_answer(owner, response_id, self.answer(response, job).model_dump_json())
        except (NotFound, Gone):
            return False
        self._client.zrem(keys.UNANSWERED, f"{owner} {response_id}")
        return True

    def discard(self, response_id: str, owner: str) -> None:
        """Remove a response whose job was not accepted."""
        self._store.delete(owner, response_id)
        self._client.zrem(keys.UNANSWERED, f"{owner} {response_id}")

    def get(self, response_id: str, owner: str) -> StoredResponse:
        """Return an API key's response.

        Raises:
            NotFound: it does not exist, has expired, or belongs to another key.
        """
        stored = self._store.get(owner, response_id) if _RESPONSE_ID.fullmatch(response_id) else None
        if stored is None:
            raise NotFound("There is no such response.", code="response_not_found")
        size = len(stored.request) + len(stored.answer or "")
        return run_in_threadpool(size, partial(StoredResponse.from_json, owner, stored.request, stored.answer))

    def job(self, response: StoredResponse) -> Job:
        """Return the job of a response.

        Raises:
            NotFound: it was never accepted, or was deleted before the answer was stored.
            Gone: it is no longer stored, but the answer is.
        """
        try:
            return self._jobs.get(job_id(response.id), response.owner)
        except NotFound:
            if response.answer is not None:
                raise Gone(_NO_EVENTS, code="log_expired") from None
            raise NotFound("There is no such response.", code="response_not_found") from None

    def view(self, response: StoredResponse) -> dict[str, Any]:
        """Return a response in its present state.

        Raises:
            NotFound: its job was never accepted, or was deleted before the answer was stored.
            Gone: its job's log is no longer stored, and the answer never was.
        """
        if response.answer is not None:
            return response.answer
        job = self.job(response)
        if not job.status.terminal:
            return view(job, response.echoed, status_of(job), ()).model_dump()
        return self.answer(response, job).model_dump()

    def answer(self, response: StoredResponse, job: Job) -> ResponseView:
        """Return a response whose job has ended, from the job's log.

        Raises:
            Gone: the log is incomplete.
        """
        final = self._read(response, job).final
        if final is None:
            detail = "The response has ended, but its events are no longer stored. Its job may still have the text."
            raise Gone(detail, code="log_expired")
        return final

    def events(self, response: StoredResponse, job: Job) -> ResponseEvents:
        """Return the translator of the events of a response's job."""
        return ResponseEvents(job, response.echoed, response.shown)

    def event_count(self, response: StoredResponse, job: Job) -> int:
        """Return how many events a response has by now.

        Raises:
            Gone: the log is no longer stored, or incomplete.
        """
        count = self._read(response, job).next_number
        if not count:
            raise Gone(_NO_EVENTS, code="log_expired")
        return count

    def _read(self, response: StoredResponse, job: Job) -> ResponseEvents:
        """Return the translator after it has read the log."""
        events, after = self.events(response, job), 0
        while events.final is None and (page := self._log.read(job.id, after, _PAGE)):
            run_in_threadpool(_size(page), partial(events.of, page, job))
            after = page[-1].n
        return events

    def history(self, response_id: str | None, owner: str) -> list[Item]:
        """Return the input and the output of a response and of all those that it continues, oldest first.

        Their lifetimes begin anew.

        Raises:
            NotFound: one of them was deleted, has expired, or belongs to another key; the field is
                `previous_response_id`.
            Conflict: the response has not ended.
        """
        turns = self._turns(response_id, owner)
        items = [item for turn in turns for item in (*turn.items, *self._output(turn))]
        self._store.touch(owner, [turn.id for turn in turns])
        return ITEMS.validate_python(items)

    def resolved(self, items: Sequence[Item], owner: str) -> list[Item]:
        """Return input items with the items of stored responses in place of references to them.

        Raises:
            NotFound: there is no such item.
            Invalid: the items are too large together.
        """
        outputs = lru_cache(_OUTPUTS_KEPT)(partial(self._output_items, owner=owner))
        resolved, size = list[Item](), 0
        for index, item in enumerate(items):
            found = _referenced(item, outputs, f"input[{index}]") if isinstance(item, ItemReference) else None
            size += len(to_json(found)) if found else 0
            if size > MAX_BYTES:
                raise Invalid("The referenced items are too large together.", field=f"input[{index}]")
            resolved.append(ITEMS.validate_python([found])[0] if found else item)
        return resolved

    def _output_items(self, response_id: str, owner: str) -> dict[str, dict[str, Any]]:
        """Return the items of a response's output by their ids; none if there is no such response."""
        with suppress(NotFound, Gone):
            return {item["id"]: item for item in self.view(self.get(response_id, owner))["output"]}
        return {}

    def input_items(self, response: StoredResponse) -> list[dict[str, Any]]:
        """Return everything that the model read: the conversation before a response, and its input."""
        turns = self._turns(response.previous, response.owner)
        earlier = [item for turn in turns for item in (*turn.items, *self._output(turn))]
        return [*earlier, *response.items]

    def _turns(self, response_id: str | None, owner: str) -> list[StoredResponse]:
        turns, count, size = list[StoredResponse](), 0, 0
        while response_id is not None:
            if len(turns) >= MAX_TURNS or count > MAX_ITEMS or size > MAX_BYTES:
                raise Invalid("The conversation is too long to be continued.", field=_PREVIOUS)
            try:
                turns.append(self.get(response_id, owner))
            except NotFound:
                detail = f"There is no response {response_id[:64]!r}: it was deleted, or has expired."
                raise NotFound(detail, code="response_not_found", field=_PREVIOUS) from None
            count, size = count + len(turns[-1].items), size + turns[-1].size
            response_id = turns[-1].previous
        return turns[::-1]

    def _output(self, response: StoredResponse) -> list[dict[str, Any]]:
        try:
            shown = self.view(response)
        except (NotFound, Gone) as error:
            raise NotFound(error.detail, code="response_not_found", field=_PREVIOUS) from None
        if shown["status"] in ("queued", "in_progress"):
            detail = "The previous response has not ended. Wait for its end, or cancel it."
            raise Conflict(detail, code="response_active", field=_PREVIOUS)
        output: list[dict[str, Any]] = shown["output"]
        return output

    def delete(self, response: StoredResponse) -> None:
        """Delete a response that has ended, and its job.

        Raises:
            Conflict: it has not ended.
        """
        try:
            self._jobs.forget(job_id(response.id), response.owner, erase=True)
        except NotFound:  # the job's retention is shorter
            pass
        except Conflict:
            raise Conflict("The response has not ended. Cancel it first.", code="response_active") from None
        self.discard(response.id, response.owner)


def _referenced(
    item: ItemReference, outputs: Callable[[str], Mapping[str, dict[str, Any]]], field: str
) -> dict[str, Any]:
    match = _ITEM_ID.fullmatch(item.id)
    found = outputs(f"resp_{match[1]}").get(item.id) if match else None
    if found is None:
        detail = f"There is no item {item.id[:64]!r} of a stored response."
        raise NotFound(detail, code="item_not_found", field=field)
    return found


def _size(events: Sequence[Event]) -> int:
    return sum(len(event.data) for event in events if event.kind is EventKind.CHUNK)


def listed(items: Sequence[Item], response_id: str) -> list[dict[str, Any]]:
    """Return input items as the API lists them: with ids, and with contents as parts."""
    suffix = response_id.removeprefix("resp_")
    return [{**_listed(item), "id": f"in_{suffix}_{number}"} for number, item in enumerate(items)]


def _listed(item: Item) -> dict[str, Any]:
    dumped: Mapping[str, Any] = item.model_dump(by_alias=True, exclude_none=True)
    fields = {**dumped, "status": "completed"}
    if item.type != "message":
        return fields
    kind = "output_text" if item.role == "assistant" else "input_text"
    parts = [{"type": kind, "text": item.content}] if isinstance(item.content, str) else fields["content"]
    return {**fields, "content": [_part(part, kind) for part in parts]}


def _part(part: Mapping[str, Any], kind: str) -> dict[str, Any]:
    if part["type"] in ("input_text", "output_text"):
        extra: dict[str, Any] = {"annotations": [], "logprobs": []} if kind == "output_text" else {}
        return {"type": kind, "text": part["text"], **extra}
    return {**part}
