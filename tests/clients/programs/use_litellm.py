"""litellm, through both APIs. Runs in the environment of the clients."""

from __future__ import annotations

import json
import os

import litellm

MODEL, URL = os.environ["MLXQ_MODEL"], os.environ["MLXQ_URL"]
APIS = ((f"openai/{MODEL}", f"{URL}/v1"), (f"anthropic/{MODEL}", URL))
PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}}
TOOL = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": PARAMETERS}}


def ask(model: str, url: str, content: str, **fields: object) -> object:
    messages = [{"role": "user", "content": content}]
    return litellm.completion(
        model=model, api_base=url, api_key=os.environ["MLXQ_API_KEY"], messages=messages, max_tokens=200, **fields
    )


for model, url in APIS:
    whole = ask(model, url, "hello")
    assert whole.choices[0].message.content == "Hello é🙂", whole
    assert whole.choices[0].finish_reason == "stop", whole
    assert whole.usage.completion_tokens > 0, whole
    chunks = list(ask(model, url, "hello", stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hello é🙂", chunks
    called = ask(model, url, "add 1", tools=[TOOL])
    (call,) = called.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("add", {"a": 1}), called
    assert called.choices[0].finish_reason == "tool_calls", called
    refused = None
    try:
        ask(model.replace(MODEL, "nobody"), url, "hello")
    except litellm.NotFoundError as error:
        refused = str(error)
    assert refused is not None
    assert "nobody" in refused, refused
