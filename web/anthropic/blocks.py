"""Content blocks of the Messages API, as requests contain them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from web.schemas.base import RequestModel

MAX_BLOCKS = 1000


def _type_tag(block: object) -> str:
    """Return the tag of a union's member: its `type` in brackets, which errors omit from the path of a field."""
    kind = block.get("type") if isinstance(block, dict) else getattr(block, "type", None)
    return f"({kind})"


def by_type(supported: str) -> Discriminator:
    """Select a union's member by its `type`. Other types are refused with a list of the supported ones."""
    message = f"This type is not supported here; supported: {supported}"
    return Discriminator(_type_tag, custom_error_type="unsupported_type", custom_error_message=message)


CacheControl = Annotated[dict[str, Any], Field(description="Accepted as advice; has no effect")]
"""The prefix cache decides by itself what to keep. Clients add fields to this object."""


class Cacheable(RequestModel):
    """A part of a prompt that may carry `cache_control`."""

    cache_control: CacheControl | None = None


class Citations(RequestModel):
    """Citations, which this service does not generate."""

    enabled: Literal[False] = False


class TextBlock(Cacheable):
    """Text."""

    type: Literal["text"]
    text: str
    citations: Annotated[list[Any], Field(max_length=0)] | None = None


class Base64Image(RequestModel):
    """An image in the request."""

    type: Literal["base64"]
    media_type: Literal["image/jpeg", "image/png", "image/gif", "image/webp"]
    data: str = Field(min_length=1)

    @property
    def url(self) -> str:
        """The image as a data URL."""
        return f"data:{self.media_type};base64,{self.data}"


class UrlImage(RequestModel):
    """An image at an http(s) URL, if the service reads them."""

    type: Literal["url"]
    url: str = Field(min_length=1)


ImageSource = Annotated[
    Annotated[Base64Image, Tag("(base64)")] | Annotated[UrlImage, Tag("(url)")], by_type("base64, url")
]


class Transformations(RequestModel):
    """What to do with an image that the model does not support as it is: images are scaled as the model's are."""

    oversized_image: Literal["downsize"] = "downsize"


class ImageBlock(Cacheable):
    """An image."""

    type: Literal["image"]
    source: ImageSource
    transformations: Transformations | None = None


class TextSource(RequestModel):
    """A document's text."""

    type: Literal["text"]
    media_type: Literal["text/plain"]
    data: str


class DocumentBlock(Cacheable):
    """A document of plain text. The model reads it as text, after its title and context."""

    type: Literal["document"]
    source: TextSource = Field(description="Only plain text is supported")
    title: str | None = None
    context: str | None = None
    citations: Citations | None = None

    @property
    def text(self) -> str:
        """The document as text."""
        return "\n\n".join(part for part in (self.title, self.context, self.source.data) if part)


class DirectCaller(RequestModel):
    """The model itself called the tool."""

    type: Literal["direct"]


class ToolUseBlock(Cacheable):
    """A call of a tool in an earlier answer."""

    type: Literal["tool_use"]
    id: str = Field(min_length=1, max_length=256)
    name: str = Field(min_length=1, max_length=128)
    input: dict[str, Any]
    caller: DirectCaller | None = None


ResultContent = Annotated[
    Annotated[TextBlock, Tag("(text)")]
    | Annotated[ImageBlock, Tag("(image)")]
    | Annotated[DocumentBlock, Tag("(document)")],
    by_type("text, image, document"),
]


def text_or_blocks(content: object) -> str:
    """Return the tag of a text or of a list of blocks."""
    return "(text)" if isinstance(content, str) else "(blocks)"


class ToolResultBlock(Cacheable):
    """The result of a tool."""

    type: Literal["tool_result"]
    tool_use_id: str = Field(min_length=1, max_length=256)
    content: Annotated[
        Annotated[str, Tag("(text)")] | Annotated[list[ResultContent], Field(max_length=MAX_BLOCKS), Tag("(blocks)")],
        Discriminator(text_or_blocks),
    ] = ""
    is_error: bool = Field(False, description="Whether the tool failed; the model then reads `Error: ` before the text")


class ThinkingBlock(RequestModel):
    """Reasoning in an earlier answer. Its signature is not checked."""

    type: Literal["thinking"]
    thinking: str
    signature: str = ""


Block = Annotated[
    Annotated[TextBlock, Tag("(text)")]
    | Annotated[ImageBlock, Tag("(image)")]
    | Annotated[DocumentBlock, Tag("(document)")]
    | Annotated[ToolUseBlock, Tag("(tool_use)")]
    | Annotated[ToolResultBlock, Tag("(tool_result)")]
    | Annotated[ThinkingBlock, Tag("(thinking)")],
    by_type("text, image, document, tool_use, tool_result, thinking"),
]
