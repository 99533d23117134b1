"""The parts of mlx-lm's tokenizer wrapper from which the loading of a model makes its card."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class BareTokenizer:
    """A tokenizer that declares neither a template nor markers.

    Args:
        limit: its `model_max_length`.
        size: number of its tokens.
    """

    chat_template = bos_token = eos_token = None
    eos_token_ids: Sequence[int] = (0,)
    has_thinking = has_tool_calling = has_chat_template = False
    think_start_tokens = think_end_tokens = response_initial_state = None
    structural_markers: Sequence[str] = ()

    def __init__(self, limit: int = 10**30, size: int = 8) -> None:
        self.model_max_length = limit
        self.response_transitions: dict[str, Any] = {}
        self._size = size

    def get_vocab(self) -> dict[str, int]:
        return {}

    def __len__(self) -> int:
        return self._size
