"""Jobs and generated text, as clients receive them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, GetJsonSchemaHandler, SerializerFunctionWrapHandler, model_serializer
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from shared.jobs.record import AttemptEnd, Status
from web.parsing.actions import ActionName
from web.schemas.base import ResponseModel
from web.schemas.requests import PriorityName


class Alternative(ResponseModel):
    """A likely token at a position of the text."""

    token: str
    logprob: float


class TokenLogprob(ResponseModel):
    """A generated token with its log-probability under the model's distribution, before temperature and penalties."""

    token: str = Field(description="Text of the token; U+FFFD stands for bytes that are not a complete character")
    logprob: float
    bytes: list[int] | None = Field(None, description="Bytes of the token, if its text does not determine them")
    top: list[Alternative] = Field([], description="The most likely tokens at this position, best first")


_LOGPROBS_DESCRIPTION = (
    "One entry per token, if the request set `logprobs`, the job has ended and its log is still stored; otherwise null"
)


class Output(ResponseModel):
    """The text generated so far."""

    text: str
    finish_reason: str | None = Field(
        description="`stop` or `length`; null while the job runs, or if it did not finish"
    )
    logprobs: list[TokenLogprob] | None = Field(None, description=_LOGPROBS_DESCRIPTION)


class PointView(ResponseModel):
    """A point in the last image of the request, in pixels of the image as it was sent, from the upper left."""

    x: float
    y: float
    inside: bool = Field(description="Whether the point is inside the image")


class BoxView(ResponseModel):
    """A rectangle in the last image of the request, in pixels of the image as it was sent, from the upper left."""

    x1: float
    y1: float
    x2: float
    y2: float
    inside: bool = Field(description="Whether the whole box is inside the image")


class ActionView(ResponseModel):
    """An action that a GUI model requests. Fields that do not apply to the action are null."""

    action: ActionName = Field(
        description="The name that the model used. With `parse: ui_tars`, an action of UI-TARS; with "
        "`parse: computer_use`, the argument `action` of `computer_use` or `mobile_use`"
    )
    raw: str = Field(description="The call as the model wrote it")
    thought: str | None = Field(description="The reasoning that the model wrote before the action")
    start: PointView | None = Field(
        description="Where to act; for `drag` and `swipe`, where to start. Without it, actions of the mouse apply at "
        "the pointer"
    )
    end: PointView | None = Field(
        description="Where `drag`, `swipe` or `left_click_drag` ends, or `scroll` if it has no direction and no pixels"
    )
    key: str | None = Field(
        description="Keys of `hotkey` and `key`, separated by spaces: `ctrl c`; the key of `press` and `release`"
    )
    text: str | None = Field(
        description="Text to `type`, where a newline at the end submits it; or the closing message of `finished`, "
        "`call_user`, `answer` or `terminate`"
    )
    direction: Literal["up", "down", "left", "right"] | None = Field(description="Direction of `scroll` (UI-TARS)")
    pixels: float | None = Field(
        description="Amount of `scroll` and `hscroll` (computer_use) as the model wrote it; positive values scroll up"
    )
    app: str | None = Field(description="Name of the app for `open_app` and `open`")
    button: str | None = Field(
        description="For `system_button`: `Back`, `Home`, `Menu` or `Enter`. For `mouse_down` and `mouse_up`: `left` "
        "or `right`"
    )
    time: str | None = Field(
        description="Duration of `wait` in seconds, or of `long_press`, as the model wrote it; null if it wrote none. "
        "UI-TARS defines no unit for `long_press`; mobile_use means seconds"
    )
    status: str | None = Field(description="Outcome of `terminate`: `success` or `failure`")


class RegionView(ResponseModel):
    """A place in the last image of the request."""

    label: str | None = Field(description="The model's description of the place")
    point: PointView = Field(description="The point; of a box, its center")
    box: BoxView | None = Field(description="The box; null if the model returned a point")
    raw: str = Field(description="The JSON object as the model wrote it")


class FunctionCallView(ResponseModel):
    """The function that a tool call calls."""

    name: str
    arguments: str = Field(description="A JSON object as text")


class ToolCallView(ResponseModel):
    """A tool call of the model."""

    id: str = Field(description="Send it back with the call's result")
    type: Literal["function"] = "function"
    function: FunctionCallView


class MessageView(ResponseModel):
    """The answer as a message, in OpenAI's form."""

    role: Literal["assistant"] = "assistant"
    content: str | None = Field(description="The text without reasoning; null if there is none next to tool calls")
    reasoning_content: str | None = Field(description="The model's reasoning; null if there is none")
    tool_calls: list[ToolCallView] | None = Field(description="The tools that the model calls; null if there are none")


_PARSED = frozenset({"actions", "regions", "parse_error", "message"})


class Parsed(ResponseModel):
    """Structured data from the text. The fields are present only if the request set `parse` to their format."""

    actions: list[ActionView] | None = Field(
        None,
        description="Actions in the text; null until the job has ended. Present only with `parse: ui_tars` and "
        "`parse: computer_use`",
    )
    regions: list[RegionView] | None = Field(
        None,
        description="Points and boxes in the text; null until the job has ended. Present only with `parse: grounding`",
    )
    parse_error: str | None = Field(
        None, description="Why the text has no valid actions or regions. Present only if either is"
    )
    message: MessageView | None = Field(
        None,
        description="The answer as a message; null until the job has ended, in lists, and once the job's log is no "
        "longer stored. Present only with `parse: message`",
    )

    @model_serializer(mode="wrap")
    def _without_fields_that_were_not_requested(self, serialize: SerializerFunctionWrapHandler):  # type: ignore[no-untyped-def]
        fields = serialize(self)
        for name in _PARSED - self.model_fields_set:
            del fields[name]
        return fields

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Document that the fields may be absent."""
        documented = handler(schema)
        target = handler.resolve_ref_schema(documented)
        target["required"] = [name for name in target["required"] if name not in _PARSED]
        return documented


class SamplingView(ResponseModel):
    """The sampling parameters of the answer, with all defaults: those of the request, the catalog and the model."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int


_SAMPLING_DESCRIPTION = "What was used for sampling; null for jobs of earlier versions"


class Usage(ResponseModel):
    """Token counts; null until they are known."""

    prompt_tokens: int | None
    completion_tokens: int | None
    cached_tokens: int | None = Field(description="Prompt tokens that the prefix cache supplied")
    reasoning_tokens: int | None = Field(
        None, description="Completion tokens of reasoning; null unless the request set `parse: message`"
    )


class Timings(ResponseModel):
    """Durations in seconds; null until they are known."""

    queue_s: float | None = Field(None, description="Waiting in the queue")
    prefill_s: float | None = Field(None, description="Processing the prompt")
    first_token_s: float | None = Field(None, description="From submission to the first token")
    total_s: float | None = Field(None, description="From submission to the end")


class JobError(ResponseModel):
    """Why a job failed or expired."""

    code: str = Field(
        description="Stable code. Expired jobs: `start_timeout` (the job did not start in time), `deadline_exceeded` "
        "(it started and did not finish in time). Failed jobs: `worker_lost`, `context_length_exceeded`, "
        "`template_error`, `constraint_error`, `generation_error`, `out_of_memory`, `engine_error`, `log_lost`, "
        "`image_lost`, `adapter_error`, `model_not_found`, `load_failed`"
    )
    message: str = Field(description="The reason, for people")


class AttemptView(ResponseModel):
    """One attempt of a worker to run a job. Times are in seconds since the epoch."""

    attempt: int
    worker: str = Field(description="Opaque id that distinguishes workers")
    started_at: float
    ended_at: float | None = Field(description="Null while the attempt runs")
    outcome: AttemptEnd | None = Field(
        description="`ended`: the job ended; `worker_lost`: the worker died or became unreachable; `handed_back`: the "
        "worker stopped and returned the job to the queue; null while the attempt runs"
    )


class Urls(ResponseModel):
    """Paths of a job."""

    self: str
    stream: str
    cancel: str


class JobView(Parsed):
    """A job. Times are in seconds since the epoch."""

    id: str
    object: Literal["job"] = "job"
    status: Status = Field(
        description="`queued` and `running` are temporary; `succeeded`, `failed`, `cancelled` and `expired` are final"
    )
    key_id: str = Field(description="Id of the API key that submitted the job")
    model: str = Field(description="Id of the model, also if the request named an alias")
    adapter: str | None = Field(None, description="Adapter with which the model generates; null for none")
    kind: str = Field(description="`generate`, `embedding` or `rerank`")
    attempt: int = Field(description="Number of the current or last attempt; 0 before the first")
    history: list[AttemptView] = Field(description="The attempts, oldest first; at most the last 20")
    priority: PriorityName
    created_at: float
    started_at: float | None = Field(description="When a worker first began to process the job; null before")
    finished_at: float | None = Field(description="Null until the job has ended")
    last_event: int = Field(description="Number of the last event; it grows by about one per token while the job runs")
    queue_position: int | None = Field(description="1 is next; null if the job is not waiting")
    estimated_start_s: float | None = Field(description="Estimated seconds until the job starts; null if unknown")
    output: Output | None = Field(
        description="The text generated so far; null in lists until the job has ended, and if the archive has the job "
        "without it. Of embedding and rerank jobs: a line `INDEX:BASE64` for each input, with little-endian 32-bit "
        "floats; null in lists and in the archive"
    )
    usage: Usage
    sampling: SamplingView | None = Field(description=_SAMPLING_DESCRIPTION)
    timings: Timings
    error: JobError | None = Field(description="Null unless the job failed or expired")
    metadata: dict[str, str] = Field(description="As submitted")
    children: list[str] = Field(
        description="Ids of the jobs with the further choices of the same request, which are cancelled and deleted "
        "together with this job"
    )
    archived: bool = Field(
        description="Whether the job comes from the archive. Its events and images are no longer stored"
    )
    urls: Urls


class StoredRequestView(ResponseModel):
    """The request of a job as it is stored: with all defaults, and images replaced by references."""

    id: str = Field(description="Id of the job")
    object: Literal["job_request"] = "job_request"
    prompt: str | None
    messages: list[dict[str, Any]] | None = Field(
        description="An image is `{type: image, image, width, height}`; `image` is the name under which "
        "`/v1/jobs/{job_id}/images/{name}` has it"
    )
    options: dict[str, Any] = Field(description="All other fields of the stored request")
    prompt_tokens: int | None = Field(description="Tokens of the prompt; null if not yet known")


class JobList(ResponseModel):
    """A page of jobs, newest first."""

    object: Literal["list"] = "list"
    data: list[JobView]
    next: str | None = Field(
        description="Pass it as `before` to get the next page; null on the last page. With filters, a page "
        "can have fewer jobs than `limit`, or none, and still be followed by others"
    )
    complete: bool = Field(
        True, description="False if the archive could not be read, so that jobs that are only there are missing"
    )


class InferenceView(Parsed):
    """The result of a request to `/inference`."""

    id: str = Field(description="Id of the job")
    model: str
    adapter: str | None = Field(None, description="Adapter with which the model generated; null for none")
    text: str
    finish_reason: str | None = Field(description="`stop` or `length`")
    logprobs: list[TokenLogprob] | None = Field(None, description=_LOGPROBS_DESCRIPTION)
    usage: Usage
    sampling: SamplingView | None = Field(description=_SAMPLING_DESCRIPTION)
    timings: Timings
