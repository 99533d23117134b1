"""What comes in and what goes out, as pydantic models: they validate, and OpenAPI is made from them."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from shared.jobs.attempts import AttemptEnd
from shared.jobs.record import Status
from shared.models.operations import OperationState

MAX_STOPS = 16
MAX_METADATA = 16
MAX_MESSAGES = 10_000
MAX_LOGPROBS = 20

StopString = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
Stop = Annotated[
    list[StopString],
    Field(max_length=MAX_STOPS),
    # One string means a list of one. Told by a validator rather than a union: errors then name the element.
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": MAX_STOPS},
            ]
        }
    ),
]
Metadata = Annotated[
    dict[
        Annotated[str, StringConstraints(min_length=1, max_length=64)],
        Annotated[str, StringConstraints(max_length=512)],
    ],
    Field(max_length=MAX_METADATA),
]
PriorityName = Literal["high", "normal", "batch"]


class _Request(BaseModel):
    """Strict: a number in quotes, NaN or a field nobody reads is a mistake worth telling."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class ImageUrl(_Request):
    """Where an image is, as OpenAI's clients send it."""

    url: str = Field(min_length=1, description="A data URL; http(s) where the service allows it")
    detail: Literal["auto", "low", "high"] = Field("auto", description="Taken, and without effect")


class Part(_Request):
    """A part of what is said: text, or an image in OpenAI's form (`image_url`) or a shorter one (`image`)."""

    type: Literal["text", "image_url", "image"]
    text: str | None = None
    image_url: Annotated[
        ImageUrl | None, BeforeValidator(lambda url: {"url": url} if isinstance(url, str) else url)
    ] = None
    image: str | None = Field(None, min_length=1, description="A data URL; http(s) where the service allows it")

    @model_validator(mode="after")
    def _what_its_type_says(self) -> Self:
        given = {name for name in ("text", "image_url", "image") if getattr(self, name) is not None}
        if given != {self.type}:
            raise PydanticCustomError("part", "A part of type {type} has {type} and nothing else", {"type": self.type})
        return self

    @property
    def source(self) -> str:
        """The URL of an image."""
        return self.image_url.url if self.image_url else self.image or ""

    def record(self) -> dict[str, Any]:
        """As a job's record has it; images are replaced by `StoredImage` before."""
        return {"type": "text", "text": self.text or ""}


class StoredImage(_Request):
    """What stands in a job's messages for an image: its digest and its size in pixels."""

    image: str
    width: int
    height: int

    def record(self) -> dict[str, Any]:
        """As a job's record has it."""
        return {"type": "image", **self.model_dump()}


def _text_or_parts(content: object) -> str:
    return "(text)" if isinstance(content, str) else "(parts)"


# In brackets: what is no name of a field is left out where an error tells the way to one.
Content = Annotated[
    Annotated[str, Tag("(text)")] | Annotated[list[Part], Field(min_length=1, max_length=1000), Tag("(parts)")],
    Discriminator(_text_or_parts),
]


class Message(_Request):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: Content

    @property
    def empty(self) -> bool:
        """Whether it says nothing and shows nothing."""
        if isinstance(self.content, str):
            return not self.content
        return not any(part.type != "text" or part.text for part in self.content)

    def record(self) -> dict[str, Any]:
        """As a job's record has it. Parts that are all text are one text: most models' templates know no parts."""
        if isinstance(self.content, str):
            return {"role": self.role, "content": self.content}
        parts = [part.record() for part in self.content]
        plain = all(part["type"] == "text" for part in parts)
        return {"role": self.role, "content": "\n".join(part["text"] for part in parts) if plain else parts}


class JobRequest(_Request):
    """A generation request: `prompt`, or `messages` for the model's chat template."""

    model: str | None = Field(None, min_length=1, max_length=256, description="Default: the service's model")
    prompt: str | None = Field(None, min_length=1, description="Plain text, instead of messages")
    messages: list[Message] | None = Field(
        None,
        min_length=1,
        max_length=MAX_MESSAGES,
        fail_fast=True,
        validate_default=True,
        description="A conversation to answer",
    )
    images: list[Annotated[str, StringConstraints(min_length=1)]] = Field(
        [],
        max_length=1000,
        description="Data URLs of images (http(s) where the service allows it), shown before the prompt or before the "
        "last thing that the user says",
    )
    max_tokens: int | None = Field(None, ge=1, le=2**31 - 1, description="Most tokens to generate")
    temperature: float | None = Field(None, ge=0, le=2, description="0 takes the likeliest token each time")
    top_p: float = Field(1.0, gt=0, le=1, description="Sample from the likeliest tokens of this total probability")
    top_k: int = Field(0, ge=0, le=2**31 - 1, description="Sample from this many likeliest tokens; 0: from all")
    min_p: float = Field(0.0, ge=0, le=1, description="Least probability, relative to the likeliest token's")
    repetition_penalty: float = Field(1.0, gt=0, le=10, description="Above 1, tokens seen before get less likely")
    presence_penalty: float = Field(0.0, ge=-2, le=2, description="Taken from the logits of tokens generated before")
    frequency_penalty: float = Field(0.0, ge=-2, le=2, description="The same, times how often")
    seed: int | None = Field(None, ge=0, lt=2**63, description="The same seed gives the same text; default: random")
    stop: Stop = Field([], description=f"Ends the text before any of these, at most {MAX_STOPS}")
    priority: PriorityName = Field("normal", description="A higher class is always served first")
    start_within_s: float | None = Field(
        None, gt=0, description="Expires when it has not started by then; once it has, only the deadline counts"
    )
    deadline_s: float | None = Field(None, gt=0, description="Expires when it takes longer in all, waiting included")
    metadata: Metadata = Field({}, description="Kept with the job and given back")
    parse: Literal["ui_tars"] | None = Field(
        None,
        description="`ui_tars`: give the answer's actions as data, too, with places in the image's own pixels",
    )
    share_system_prompt: bool = Field(
        False,
        description="Let jobs of all keys that begin with the same system message start as fast as if it were their "
        "own; they can tell that somebody sent it. Nothing behind it is shared",
    )

    logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_LOGPROBS,
        description="Give the log-probability of each token, and of so many of the likeliest tokens at its place "
        f"(0 to {MAX_LOGPROBS}); null: none",
    )

    @field_validator("messages")
    @classmethod
    def _one_prompt(cls, messages: list[Message] | None, info: ValidationInfo) -> list[Message] | None:
        if "prompt" in info.data and (info.data["prompt"] is None) == (messages is None):
            raise PydanticCustomError("prompt_or_messages", "Exactly one of prompt and messages is needed")
        if messages is not None and all(message.empty for message in messages):
            raise PydanticCustomError("empty_messages", "No message holds any text")
        return messages

    @field_validator("share_system_prompt")
    @classmethod
    def _system_prompt_to_share(cls, share: bool, info: ValidationInfo) -> bool:
        if share and not ((messages := info.data.get("messages")) and messages[0].role == "system"):
            raise PydanticCustomError("no_system_prompt", "It needs messages of which the first is the system's")
        return share

    @property
    def prompt_field(self) -> str:
        """The field that the prompt came in."""
        return "messages" if self.prompt is None else "prompt"

    @property
    def image_parts(self) -> list[tuple[str, Part]]:
        """The images among the parts of its messages, each with the way to it."""
        return [
            (f"messages[{i}].content[{k}]", part)
            for i, message in enumerate(self.messages or [])
            if not isinstance(message.content, str)
            for k, part in enumerate(message.content)
            if part.type != "text"
        ]

    def meaning(self, model: str | None = None, settled: Collection[str] = ()) -> str:
        """The request as a line that is the same for all ways to write it: sorted, and without what is default.

        Args:
            model: the id of the model that it names, maybe by an alias.
            settled: what this model has defaults of its own for: there, the API's is an answer like any other.
        """
        meant = self.model_dump(mode="json", exclude_defaults=True, exclude={"messages"})
        meant |= self.model_dump(mode="json", include=self.model_fields_set & set(settled), exclude_none=True)
        if self.model:
            meant["model"] = model or self.model
        if self.messages:
            meant["messages"] = [message.record() for message in self.messages]
        return json.dumps(meant, sort_keys=True)

    def conversation(self, *, has_template: bool) -> tuple[dict[str, Any], ...] | None:
        """The messages for the model's chat template; None when the prompt goes to the model as it is."""
        del has_template
        return tuple(message.record() for message in self.messages) if self.messages else None


class InferenceRequest(JobRequest):
    """A generation request to be answered on the same connection; its prompt is a question to the model."""

    stream: bool = Field(False, description="Send the text as it comes")
    raw: bool = Field(
        False, description="Go on from the prompt as it is, without the model's chat template; not with images"
    )

    @field_validator("raw")
    @classmethod
    def _prompt_to_go_on_from(cls, raw: bool, info: ValidationInfo) -> bool:
        if raw and info.data.get("messages"):
            raise PydanticCustomError("no_raw_prompt", "It needs a prompt; messages go through the chat template")
        return raw

    def conversation(self, *, has_template: bool) -> tuple[dict[str, Any], ...] | None:
        """As for a job, but a prompt is what a user says, unless it is raw or the model knows no conversations."""
        if self.prompt is not None and not self.messages and has_template and not self.raw:
            return ({"role": "user", "content": self.prompt},)
        return super().conversation(has_template=has_template)


class _Answer(BaseModel):
    # Defaults are always written: a client may rely on every field being there.
    model_config = ConfigDict(json_schema_mode="serialization", json_schema_serialization_defaults_required=True)  # type: ignore[typeddict-unknown-key]


class Alternative(_Answer):
    """One of the likeliest tokens at a place of the text."""

    token: str
    logprob: float


class TokenLogprob(_Answer):
    """A token of the text with its log-probability, as the model gave it before sampling changed anything."""

    token: str = Field(description="Its text; U+FFFD stands for bytes that are no whole character")
    logprob: float
    bytes: list[int] | None = Field(None, description="Its bytes, where its text does not show them")
    top: list[Alternative] = Field([], description="The likeliest tokens at its place, best first")


_LOGPROBS_ABOUT = "With `logprobs`, once the job has ended and while its log is kept; else null"


class Output(_Answer):
    """The text so far, or in all."""

    text: str
    finish_reason: str | None = Field(description="`stop`, `length`, or null while it runs or when it was cut")
    logprobs: list[TokenLogprob] | None = Field(None, description=_LOGPROBS_ABOUT)


class PointView(_Answer):
    """A place in the last image of the request, in its own pixels."""

    x: float
    y: float
    inside: bool = Field(description="Whether the image has such a place")


class ActionView(_Answer):
    """One action of an answer of UI-TARS."""

    action: Literal[
        "click", "left_double", "right_single", "drag", "hotkey", "type", "scroll", "wait", "finished", "call_user"
    ]
    raw: str = Field(description="As the model wrote it")
    thought: str | None
    start: PointView | None = Field(description="Where; of a drag where from")
    end: PointView | None = Field(description="Of a drag: where to")
    key: str | None = Field(description="Of a hotkey: the keys, as `ctrl c`")
    text: str | None = Field(description="What to type (a newline at its end submits it), or what `finished` says")
    direction: Literal["up", "down", "left", "right"] | None


class Parsed(_Answer):
    """What `parse` found in an answer."""

    actions: list[ActionView] | None = Field(None, description="With `parse`, once the job has ended; else null")
    parse_error: str | None = Field(None, description="Why the text has no actions, or no more of them")


class Usage(_Answer):
    """Tokens, once they are counted."""

    prompt_tokens: int | None
    completion_tokens: int | None
    cached_tokens: int | None


class Timings(_Answer):
    """Seconds; each is there once it is known."""

    queue_s: float | None = None
    prefill_s: float | None = None
    first_token_s: float | None = None
    total_s: float | None = None


class JobError(_Answer):
    """Why a job failed or expired."""

    code: str = Field(
        description="Stable. Of an expired job: `start_timeout` when it never started, `deadline_exceeded` when it was "
        "cut off. Of a failed one: `worker_lost`, `context_length_exceeded`, `template_error`, `generation_error`, "
        "`out_of_memory`, `engine_error`, `log_lost`, `image_lost`"
    )
    message: str


class AttemptView(_Answer):
    """One worker's try at a job. Times are seconds since the epoch."""

    attempt: int
    worker: str = Field(description="Tells workers apart; not a name that leads anywhere")
    started_at: float
    ended_at: float | None = Field(description="Null while it is under way")
    outcome: AttemptEnd | None = Field(
        description="`worker_lost`: it was lost with its worker; `handed_back` by a worker that had to stop; `ended`: "
        "the job ended with it; null while it is under way"
    )


class Urls(_Answer):
    """Where to go on."""

    self: str
    stream: str
    cancel: str


class JobView(Parsed):
    """A job as its owner sees it. Times are seconds since the epoch."""

    id: str
    object: Literal["job"] = "job"
    status: Status
    model: str
    attempt: int = Field(description="How often a worker has begun it")
    history: list[AttemptView] = Field(description="What became of its attempts; of more than 20, the newest")
    priority: PriorityName
    created_at: float
    started_at: float | None
    finished_at: float | None
    queue_position: int | None = Field(description="1 is next; null when it does not wait")
    estimated_start_s: float | None = Field(description="Seconds from now; null when that is not known")
    output: Output | None = Field(description="The text so far, or in all; null in lists while the job runs")
    usage: Usage
    timings: Timings
    error: JobError | None
    metadata: dict[str, str]
    urls: Urls


class JobList(_Answer):
    """A page of the caller's jobs, newest first."""

    object: Literal["list"] = "list"
    data: list[JobView]
    next: str | None = Field(description="Value of `before` for the next page; null on the last")


class InferenceView(Parsed):
    """An answer in one piece."""

    id: str
    model: str
    text: str
    finish_reason: str | None
    logprobs: list[TokenLogprob] | None = Field(None, description=_LOGPROBS_ABOUT)
    usage: Usage
    timings: Timings


ModelState = Literal["warm", "loading", "draining", "cold", "absent"]


class ModelWorkerView(_Answer):
    """What one worker has of a model."""

    worker: str = Field(description="Its name, for `load_model` and `unload_model`")
    state: ModelState
    slots: int
    slots_used: int
    pinned: bool
    progress: float = Field(description="Of the loading, from 0 to 1")
    memory_bytes: int = Field(description="What its weights take")
    load_s: float = Field(description="What its loading took")
    tokens_per_s: float = Field(description="Generated over the last minute")


class ModelView(_Answer):
    """A model that requests may name."""

    id: str
    object: Literal["model"] = "model"
    aliases: list[str] = Field(description="Other names for it")
    kind: str | None = Field(description="`text` or `vision`; null: not known")
    context: int | None = Field(description="Most tokens of prompt and answer together; null: not known")
    default: bool
    state: ModelState = Field(
        description="Of its workers, the best. `cold`: none has it; `absent`: nor has the catalog, and jobs wait until "
        "a worker comes that does"
    )
    workers: list[ModelWorkerView]
    slots: int
    slots_used: int
    waiting: int
    memory_bytes: int | None = Field(
        description="What its weights take in a worker; while it is cold, about what they will"
    )
    load_s: float | None = Field(description="What its loading took; null while it is cold")
    tokens_per_s: float = Field(description="Generated over the last minute, by all its workers")


class ModelList(_Answer):
    """The models."""

    object: Literal["list"] = "list"
    data: list[ModelView]
    faults: list[str] = Field(
        description="Entries of the catalog that are wrong, by line; they do not serve. Only for the scope `admin`"
    )


class OpenAIModel(ModelView):
    """A model in OpenAI's form, with ours beside it."""

    created: int
    owned_by: str = "mlxq"


class OpenAIModelList(_Answer):
    """The models in OpenAI's form."""

    object: Literal["list"] = "list"
    data: list[OpenAIModel]


class OpenAIErrorDetails(_Answer):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(_Answer):
    """An error in OpenAI's form."""

    error: OpenAIErrorDetails


class LoadRequest(_Request):
    """Which model to load, and where."""

    model: str = Field(min_length=1, max_length=256, description="Id or alias of a model of the catalog")
    worker: str | None = Field(None, min_length=1, description="Default: the one with most memory left")
    mode: Literal["beside", "replace"] = Field(
        "beside", description="`replace`: what is warm there and not pinned goes, also where there is memory for both"
    )
    pin: bool = Field(False, description="Never unload it to make place for another")


class UnloadRequest(_Request):
    """Which model to let go of, and where."""

    model: str = Field(min_length=1, max_length=256)
    worker: str | None = Field(None, min_length=1, description="Needed where several have it")


class OperationError(_Answer):
    """Why an operation failed."""

    code: str = Field(
        description="Stable: `not_enough_memory`, `load_failed`, `model_not_found`, `model_not_loaded`, `worker_lost`, "
        "`worker_silent`, `internal`"
    )
    message: str


class OperationView(_Answer):
    """A loading or unloading. Times are seconds since the epoch."""

    id: str
    object: Literal["operation"] = "operation"
    kind: str = Field(description="`load` or `unload`")
    model: str
    worker: str
    state: OperationState
    progress: float = Field(description="Of the loading, from 0 to 1")
    unloaded: list[str] = Field(description="Models that had to make place")
    memory_before: int | None = Field(description="Bytes that the worker's MLX held in use")
    memory_after: int | None
    created_at: float
    updated_at: float
    error: OperationError | None


class OperationList(_Answer):
    """Operations, the newest first."""

    object: Literal["list"] = "list"
    data: list[OperationView]


class WorkerMemory(_Answer):
    """Bytes that MLX holds in a worker process."""

    active_bytes: int = Field(description="In use")
    cache_bytes: int = Field(description="Kept for later use")
    peak_bytes: int = Field(description="Most that was in use")


class WorkerView(_Answer):
    """A worker, as it announced itself and as it answered a ping."""

    id: str
    host: str
    node: str = Field(description="Its process, by the name that `load_model` and `unload_model` take")
    model: str
    state: str
    heartbeat_age_s: float
    response_s: float | None = Field(description="Of a Celery control ping; null when it did not answer")
    slots: int
    slots_used: int
    uptime_s: float
    memory: WorkerMemory | None = Field(description="Of its process, as MLX counts; null before a model is loaded")
    about: dict[str, Any]


class RedisView(_Answer):
    """The queue's Redis."""

    reachable: bool
    response_s: float | None


class HealthView(_Answer):
    """How the service is. `down` means that no job can be run at present."""

    status: Literal["ok", "degraded", "down"]
    reasons: list[str]
    redis: RedisView
    workers: list[WorkerView]
    queues: dict[str, int] = Field(description="Jobs that wait, by model")


class ProbeView(_Answer):
    """The answer of a probe."""

    status: Literal["ok", "unavailable"]


class Fault(_Answer):
    """One of several things wrong with a request."""

    field: str | None
    code: str
    detail: str


class ProblemDetails(_Answer):
    """An error (RFC 9457). `code` is stable; `detail` is for people."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    field: str | None = Field(None, description="The field or header at fault")
    errors: list[Fault] | None = Field(None, description="All faults, when a body was checked")
    request_id: str
