"""OpenAI's Agents SDK on /v1/responses: an agent writes a file and reads it. Runs in an environment of its own."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from agents import Agent, Runner, function_tool, set_tracing_disabled
from agents.models.openai_responses import OpenAIResponsesModel
from openai import AsyncOpenAI
from pydantic import BaseModel

MODEL, URL, KEY = (os.environ[name] for name in ("MLXQ_MODEL", "MLXQ_URL", "MLXQ_API_KEY"))


class Person(BaseModel):
    """The structured answer of the second agent."""

    name: str
    age: int


@function_tool
def write_file(name: str, content: str) -> str:
    """Write a file."""
    Path(name).write_text(content)
    return f"wrote {name}"


@function_tool
def read_file(name: str) -> str:
    """Read a file."""
    return Path(name).read_text()


async def main() -> None:
    set_tracing_disabled(True)
    model = OpenAIResponsesModel(MODEL, AsyncOpenAI(base_url=f"{URL}/v1", api_key=KEY))
    writer = Agent("writer", instructions="Use the tools.", tools=[write_file, read_file], model=model)
    streamed = Runner.run_streamed(writer, "Create hello.txt")
    deltas = [
        event.data.delta
        async for event in streamed.stream_events()
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta"
    ]
    assert streamed.final_output == "The file says salut.", streamed.final_output
    assert "".join(deltas) == "I write the file.The file says salut.", deltas
    described = await Runner.run(Agent("person", output_type=Person, model=model), "person as JSON")
    assert described.final_output == Person(name="Ada é", age=36), described.final_output


asyncio.run(main())
