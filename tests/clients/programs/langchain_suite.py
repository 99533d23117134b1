"""LangChain's standard tests of chat models, with its OpenAI client. Runs in the environment of the clients."""

from __future__ import annotations

import os
from typing import Any

from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests


class TestChatModel(ChatModelIntegrationTests):
    """All tests that the model's abilities allow."""

    supports_json_mode = True
    supports_image_inputs = False

    @property
    def structured_output_kwargs(self) -> dict[str, Any]:
        return {"method": os.environ["STRUCTURED_OUTPUT_METHOD"]}

    @property
    def chat_model_class(self) -> type[ChatOpenAI]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {
            "model": os.environ["MLXQ_MODEL"],
            "base_url": f"{os.environ['MLXQ_URL']}/v1",
            "api_key": os.environ["MLXQ_API_KEY"],
            "stream_usage": True,
        }
