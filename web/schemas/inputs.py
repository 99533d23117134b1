"""Requests for embeddings and for the ranking of documents, in the formats of OpenAI, Jina and Cohere."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import BeforeValidator, Discriminator, Field, StringConstraints, Tag, WithJsonSchema

from shared.jobs.inputs import MAX_INPUTS
from shared.jobs.request import EMBED, RERANK, Request, Sampling
from web.schemas.base import RequestModel, ResponseModel
from web.schemas.openai_fields import Advice
from web.schemas.requests import Metadata, PriorityName

_NO_SAMPLING: Final = Sampling(0.0)

_Text: TypeAlias = Annotated[str, StringConstraints(min_length=1)]
_Tokens: TypeAlias = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1, fail_fast=True)]


def _tag(value: object) -> str:
    """Return the tag for the type of an input. Brackets omit it from the path of an invalid field."""
    first = value[0] if isinstance(value, list) and value else None
    if not isinstance(value, list):
        return "(text)"
    return "(lists)" if isinstance(first, list) else "(tokens)" if isinstance(first, int) else "(texts)"


_Input: TypeAlias = Annotated[
    Annotated[_Text, Tag("(text)")]
    | Annotated[list[_Text], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True), Tag("(texts)")]
    | Annotated[_Tokens, Tag("(tokens)")]
    | Annotated[list[_Tokens], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True), Tag("(lists)")],
    Discriminator(_tag),
]


def _text_of(document: object) -> object:
    """Return the text of a document in Cohere's form of an object with only that."""
    return document["text"] if isinstance(document, dict) and document.keys() == {"text"} else document


_Document: TypeAlias = Annotated[
    _Text,
    BeforeValidator(_text_of),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {
                    "type": "object",
                    "properties": {"text": {"type": "string", "minLength": 1}},
                    "required": ["text"],
                    "additionalProperties": False,
                },
            ]
        }
    ),
]


class InputsRequest(RequestModel):
    """The fields that requests with inputs instead of a prompt have in common."""

    model: str = Field(min_length=1, max_length=256, description="Id or alias of a model")
    truncate: bool = Field(
        False, description="Cut inputs that are longer than the model reads. By default, they are refused"
    )
    priority: PriorityName = Field("normal", description="Jobs of a higher priority always start first")
    start_within_s: float | None = Field(
        None, gt=0, description="Seconds within which the job must start, otherwise it expires. Default: the service's"
    )
    deadline_s: float | None = Field(
        None, gt=0, description="Seconds within which the job must end, otherwise it expires. Default: the service's"
    )
    metadata: Metadata = Field({}, description="Strings that are stored and returned with the job")
    user: Advice = None

    @property
    def inputs_field(self) -> str:
        """Name of the field with the inputs."""
        raise NotImplementedError

    def to_request(self, model: str) -> Request:
        """Return the request as the job's record stores it."""
        raise NotImplementedError


class EmbeddingRequest(InputsRequest):
    """A request for the vectors of texts or token ids."""

    input: _Input = Field(
        description=f"A text or a list of token ids, or a list of up to {MAX_INPUTS} of these. No token is added to "
        "token ids"
    )
    encoding_format: Literal["float", "base64"] = Field(
        "float", description="`base64`: little-endian 32-bit floats, a quarter of the size"
    )
    dimensions: int | None = Field(
        None, ge=1, le=2**16, description="Length of the vectors: their first numbers, normalised. Default: all"
    )
    prompt_name: str | None = Field(
        None,
        min_length=1,
        max_length=64,
        description="Name of a prompt that the model's files declare, such as `query`, to put before each text. "
        "Default: the model's default prompt, usually none",
    )

    @property
    def inputs(self) -> list[str | list[int]]:
        """The inputs, each a text or token ids."""
        single = isinstance(self.input, str) or isinstance(self.input[0], int)
        inputs: Any = [self.input] if single else self.input
        return list(inputs)

    @property
    def inputs_field(self) -> str:
        """See `InputsRequest`."""
        return "input"

    def to_request(self, model: str) -> Request:
        """See `InputsRequest`."""
        return Request(
            model,
            0,
            _NO_SAMPLING,
            kind=EMBED,
            inputs=tuple(each if isinstance(each, str) else tuple(each) for each in self.inputs),
            dimensions=self.dimensions,
            prompt_name=self.prompt_name,
            truncate=self.truncate,
        )


class RerankRequest(InputsRequest):
    """A request to rank documents by their relevance for a query."""

    query: str = Field(min_length=1, description="What the documents are ranked for")
    documents: list[_Document] = Field(
        min_length=1,
        max_length=MAX_INPUTS,
        fail_fast=True,
        description=f"Up to {MAX_INPUTS} texts, or objects with a `text`",
    )
    top_n: int | None = Field(None, ge=1, description="Return only this many of the most relevant. Default: all")
    return_documents: bool = Field(True, description="Return the texts with the scores")
    instruction: str | None = Field(
        None,
        min_length=1,
        max_length=4096,
        description="How to judge the documents, for rerankers whose prompt has a place for it, such as Qwen3-Reranker",
    )

    @property
    def inputs_field(self) -> str:
        """See `InputsRequest`."""
        return "documents"

    def to_request(self, model: str) -> Request:
        """See `InputsRequest`."""
        return Request(
            model,
            0,
            _NO_SAMPLING,
            kind=RERANK,
            inputs=tuple(self.documents),
            query=self.query,
            instruction=self.instruction,
            truncate=self.truncate,
        )


class InputUsage(ResponseModel):
    """Tokens that the model read."""

    prompt_tokens: int
    total_tokens: int = Field(description="The same as `prompt_tokens`")


class EmbeddingView(ResponseModel):
    """The vector of an input."""

    object: Literal["embedding"] = "embedding"
    index: int = Field(description="Index of the input")
    embedding: list[float] | str = Field(description="The numbers, or their encoding in base64")


class EmbeddingList(ResponseModel):
    """The vectors of all inputs, in their order."""

    object: Literal["list"] = "list"
    data: list[EmbeddingView]
    model: str
    usage: InputUsage


class DocumentView(ResponseModel):
    """A document."""

    text: str


class RankedDocument(ResponseModel):
    """A document with its score."""

    index: int = Field(description="Index in `documents` of the request")
    relevance_score: float = Field(description="0 to 1; 1 is the most relevant")
    document: DocumentView | None = Field(description="Null unless `return_documents` is true")


class RerankView(ResponseModel):
    """Documents, the most relevant first."""

    id: str = Field(description="Id of the job")
    object: Literal["list"] = "list"
    model: str
    results: list[RankedDocument]
    usage: InputUsage
