"""Files, in OpenAI's format."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from web.schemas.base import ResponseModel

Purpose = Literal["batch", "batch_output"]


class FileView(ResponseModel):
    """A file. Times are in seconds since the epoch."""

    id: str
    object: Literal["file"] = "file"
    bytes: int = Field(description="Size of the content")
    created_at: int
    expires_at: int = Field(description="When the file will be deleted")
    filename: str
    purpose: Purpose = Field(description="`batch`: the input of batches; `batch_output`: the results of a batch")
    status: Literal["processed"] = Field("processed", description="Always `processed`")


class FileList(ResponseModel):
    """A page of files."""

    object: Literal["list"] = "list"
    data: list[FileView]
    first_id: str | None
    last_id: str | None = Field(description="To get the next page, pass it as `after`")
    has_more: bool


class FileDeleted(ResponseModel):
    """The confirmation that a file was deleted."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True
