"""pydantic-ai: an agent with a tool, through both APIs. Runs in an environment of its own."""

from __future__ import annotations

import os

from pydantic_ai import Agent
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider

MODEL, URL, KEY = (os.environ[name] for name in ("MLXQ_MODEL", "MLXQ_URL", "MLXQ_API_KEY"))
MODELS = (
    OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=f"{URL}/v1", api_key=KEY)),
    AnthropicModel(MODEL, provider=AnthropicProvider(base_url=URL, api_key=KEY)),
)


def add(a: int) -> str:
    """Add."""
    calls.append(a)
    return f"sum: {a + 2}"


for model in MODELS:
    calls: list[int] = []
    agent = Agent(model, tools=[add])
    result = agent.run_sync("add 1")
    assert (result.output, calls) == ("The sum is 3.", [1]), (model, result)
    with agent.run_stream_sync("hello") as stream:
        texts = list(stream.stream_text())
    assert texts[-1] == "Hello é🙂", texts
