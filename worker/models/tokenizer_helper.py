"""The tokenizer helper of a worker: `python -P -m worker.models.tokenizer_helper`.

It tokenises from `tokenizer.json` files and from model folders, which it loads as mlx-lm does. It also proves that a
model's file gives the same tokens as its folder (`prove`); only then may API hosts tokenise for the model.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer

from shared.models.facts import separate_template
from shared.tokenizing import chat_template
from shared.tokenizing.chat_tokenizer import (
    CannotTokenize,
    ChatTokenizer,
    FileTokenizer,
    special_tokens_of,
    tokenize,
)
from shared.tokenizing.conversation import Conversation
from shared.tokenizing.files import TokenizerFiles
from shared.tokenizing.helper import Reply, Tokenizers, serve
from shared.tokenizing.messages import TokenizerFault, TokenizerSource, digest
from shared.tokenizing.special_tokens import SpecialTokens
from worker.models.image_templates import for_images

_TEXTS: Final = (
    "",
    "Hello, world!",
    " leading and trailing ",
    "two  spaces,\ttabs\n\n\nand\r\nlines",
    "1234567890 3.14159 0x1F",
    "Grüße aus Köln, ça va? Ελληνικά русский עברית العربية हिन्दी 日本語 한국어",
    "🙂👩‍👩‍👧‍👦🇩🇪 e\u0301 \u200b\ufeff\u00a0 ﬁ ½ ①",
    "def f(x):\n    return {'a': [x**2, \"b\"]}  # ▁Ġ\x00\x7f",
    "<|im_start|>user\n<s>[INST] <think> </s><|endoftext|>",
    "word " * 200,
)
_TOOLS: Final = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "Weather of a <city> & more",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
    for name in ("weather", "forecast")
]
_MAX_SPECIALS: Final = 16
_NO_CODE: Final = {"trust_remote_code": False}
"""The same as in `worker.models.load`, which a helper does not import because that imports Redis."""


class FolderTokenizer:
    """A model folder's tokenizer and chat template, loaded as mlx-lm and mlx-vlm load them."""

    def __init__(self, source: TokenizerSource) -> None:
        folder = Path(source.path)
        self.wrapper: Any = _tokenizer_utils().load(folder, _options(folder), defaults=source.defaults)
        template = _vision_template(folder) or self.wrapper.chat_template
        if source.vision:
            self.wrapper.chat_template = for_images(folder, template)
        self._tokenizer = self.wrapper._tokenizer  # noqa: SLF001 - the wrapper does not forward calls
        self.explains_tools = source.explain_tools
        self._custom_template: bool = self.wrapper._chat_template is not None  # noqa: SLF001

    @classmethod
    def load(cls, source: TokenizerSource) -> FolderTokenizer:
        """Load a folder.

        Raises:
            CannotTokenize: the folder has no tokenizer that can be loaded.
        """
        try:
            return cls(source)
        except BaseException as error:  # for a broken folder the libraries raise any type, or panic
            raise CannotTokenize(TokenizerFault.UNUSABLE, f"the tokenizer cannot be loaded: {error}") from error

    @property
    def has_template(self) -> bool:
        """See `ChatTokenizer`."""
        template = self.wrapper.chat_template
        if isinstance(template, dict):
            return "default" in template
        return bool(self.wrapper.has_chat_template) or template is not None

    def text_of(self, token: int) -> str:
        """See `ChatTokenizer`."""
        return str(self.wrapper.convert_ids_to_tokens(token))

    def template(self, with_tools: bool) -> str | None:
        """See `ChatTokenizer`."""
        if self._custom_template:
            return None
        templates = _templates(self.wrapper)
        return templates.get("tool_use", templates.get("default")) if with_tools else templates.get("default")

    @property
    def reasons(self) -> bool:
        """See `ChatTokenizer`."""
        return bool(self.wrapper.has_thinking)

    @cached_property
    def special_tokens(self) -> SpecialTokens:
        """See `ChatTokenizer`."""
        templates = (self.template(with_tools) for with_tools in (False, True))
        return special_tokens_of(self.wrapper.added_tokens_decoder.values(), templates)

    def plain(self, text: str) -> Sequence[int]:
        """See `ChatTokenizer`."""
        bos = self.wrapper.bos_token
        # As in mlx-lm: a prompt that begins with the BOS token gets no second one.
        ids: Sequence[int] = self.wrapper.encode(text, add_special_tokens=bos is None or not text.startswith(bos))
        return ids

    def encode(self, text: str) -> Sequence[int]:
        """See `ChatTokenizer`."""
        if self._custom_template:  # as in mlx-lm
            ids: Sequence[int] = self._tokenizer.encode(text, add_special_tokens=False)
        else:  # as in transformers
            ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def encode_as_text(self, text: str) -> Sequence[int]:
        """See `ChatTokenizer`."""
        ids: Sequence[int] = self._tokenizer._encode_without_added_tokens(text)  # noqa: SLF001 - no other function
        return ids

    def check_length(self, text: str, max_tokens: int) -> None:
        """See `ChatTokenizer`. The caller counts the tokens."""

    def render(self, conversation: Conversation) -> str:
        """See `ChatTokenizer`."""
        options: dict[str, Any] = {"continue_final_message": True} if conversation.continue_final else {}
        try:
            text: str = self.wrapper.apply_chat_template(
                conversation.messages,
                tools=conversation.tools,
                add_generation_prompt=conversation.add_generation_prompt,
                tokenize=False,
                **options,
                **conversation.variables,
            )
        except ValueError as error:
            if conversation.continue_final:
                raise chat_template.CannotContinue from error
            raise
        return text


def _options(folder: Path) -> dict[str, Any]:
    template = separate_template(folder)
    return {**_NO_CODE, "chat_template": template} if template else dict(_NO_CODE)


def load_tokenizer(source: TokenizerSource) -> ChatTokenizer:
    """Load the tokenizer of a folder or a file."""
    return FolderTokenizer.load(source) if Path(source.path).is_dir() else FileTokenizer.load(source)


def prove(request: Mapping[str, Any]) -> Reply:
    """Carry out the operation `prove`: check that a folder's tokenizer gives the same tokens from a single file.

    Args:
        request: `source` is the folder's `TokenizerSource`; `files` is the folder for the file.

    Returns:
        Header: `digest` of the file and its `fields` of the `ModelCard`; or the `reason` why there is no such file.
    """
    source = TokenizerSource(**request["source"])
    folder = FolderTokenizer.load(source)
    inner = getattr(folder.wrapper, "_tokenizer", None)
    backend = getattr(inner, "_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        return {"reason": "its tokenizer is not based on a tokenizer.json"}, b""
    text = backend.to_str()
    fields = _card_fields(folder.wrapper)
    file_source = replace(TokenizerSource.of_card("", "", fields), explain_tools=source.explain_tools)
    file = FileTokenizer(file_source, Tokenizer.from_str(text))
    for probe in probes(fields, source.vision):
        if _outcome(folder, probe) != _outcome(file, probe):
            return {"reason": f"its tokenizer.json gives different tokens for {json.dumps(probe)[:200]}"}, b""
    name = digest(text)
    TokenizerFiles(Path(request["files"])).put(name, text)
    return {"digest": name, "fields": fields}, b""


def probes(fields: Mapping[str, Any], vision: bool) -> Iterator[dict[str, Any]]:
    """Yield requests of every kind that a template or a tokenizer may treat specially."""
    specials = sorted({value for value in fields["template_variables"].values() if isinstance(value, str)})
    texts = [*_TEXTS, *(f"{token} a{token}b {token}" for token in specials[:_MAX_SPECIALS])]
    yield from ({"prompt": text, "messages": None, "raw": raw} for raw in (True, False) for text in texts)
    for request in _chat_probes(texts, vision):
        yield request
        yield {**request, "special_tokens": True}


def _chat_probes(texts: Sequence[str], vision: bool) -> Iterator[dict[str, Any]]:
    content = " ".join(texts[1:])
    roles = ("system", "user", "assistant", "user")
    turns: list[dict[str, Any]] = [{"role": role, "content": f"{role} {content}"} for role in roles]
    conversations: list[list[dict[str, Any]]] = [
        [{"role": "user", "content": text}] for text in ("Hi", *texts[-2:], content)
    ]
    conversations += [turns[1:2], turns[:2], turns[1:], turns, [*turns, *turns[2:]], turns[:1], turns[:3]]
    conversations += [[*turns[:1], *turns[:2]], [turns[1], turns[1]], [{"role": "tool", "content": "x"}]]
    parts: list[dict[str, Any]] = [{"type": "text", "text": "What is this?"}, {"type": "text", "text": content}]
    if vision:
        parts = [{"type": "image"}, *parts, {"type": "image"}]
    conversations += [[{"role": "user", "content": parts}], [*turns[:1], {"role": "user", "content": parts}]]
    calls = [_call(f"call_{n}", name, {"city": "Köln", "days": n}) for n, name in enumerate(("weather", "forecast"))]
    called = {"role": "assistant", "content": None, "tool_calls": calls}
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "rain"} for call in calls]
    with_calls = [turns[1], called, *results, turns[2], turns[1]]
    reasoned = [turns[1], {**turns[2], "reasoning_content": "Think first."}, turns[1]]
    conversations += [
        with_calls,
        [turns[0], *with_calls],
        [turns[1], {**called, "content": "Wait"}, results[0]],
        reasoned,
    ]
    conversations += [[{"role": "developer", "content": "Be brief."}, turns[1]]]
    for messages in conversations:
        yield {"prompt": "", "messages": messages}
    for messages in (turns[:2], with_calls):
        yield {"prompt": "", "messages": messages, "tools": _TOOLS}
    yield {"prompt": "", "messages": turns[:3], "continue_final": True}
    for thinking in (True, False):
        yield {"prompt": "", "messages": turns[:2], "template_variables": {"enable_thinking": thinking}}


def _call(call_id: str, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}


def _outcome(tokenizer: ChatTokenizer, probe: Mapping[str, Any]) -> tuple[object, ...]:
    try:
        ids, shared = tokenize(tokenizer, {**probe, "share_system_prompt": True})
    except Exception as error:  # noqa: BLE001 - both tokenizers must fail in the same way
        return type(error), str(error)
    return list(ids), shared


def _card_fields(wrapper: Any) -> dict[str, Any]:
    """Return the tokenizer's fields of a `ModelCard`."""
    templates = _templates(wrapper)
    thinking = {wrapper._thinking_kwarg: wrapper.has_thinking}  # noqa: SLF001 - mlx-lm passes it to templates
    return {
        "chat_template": templates.get("default"),
        "tool_template": templates.get("tool_use"),
        "bos_token": wrapper.bos_token,
        "eos_token": wrapper.eos_token,
        "template_variables": {**wrapper.special_tokens_map, **thinking},
    }


def _templates(wrapper: Any) -> dict[str, str]:
    """Return the Jinja templates by name; a single one is the default."""
    template = wrapper.chat_template
    if isinstance(template, str):
        return {"default": template}
    return dict(template) if isinstance(template, dict) else {}


def _vision_template(folder: Path) -> str | None:
    """Return the template with which mlx-vlm replaces the tokenizer's (`mlx_vlm.models.base.load_chat_template`)."""
    if (file := folder / "chat_template.json").exists():
        return str(json.loads(file.read_text("utf-8"))["chat_template"])
    file = folder / "chat_template.jinja"
    return file.read_text("utf-8") if file.exists() else None


def _tokenizer_utils() -> Any:
    """Import mlx-lm's tokenizer module without its package, which would load MLX and open the device."""
    if "mlx_lm" not in sys.modules:
        spec = importlib.util.find_spec("mlx_lm")
        if spec is None or spec.submodule_search_locations is None:
            raise CannotTokenize(TokenizerFault.UNUSABLE, "mlx-lm is not installed")
        package = types.ModuleType("mlx_lm")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["mlx_lm"] = package
    return importlib.import_module("mlx_lm.tokenizer_utils")


if __name__ == "__main__":
    _tokenizers = Tokenizers(load_tokenizer)
    _operations = {"load": _tokenizers.load, "tokenize": _tokenizers.tokenize, "inputs": _tokenizers.inputs}
    serve({**_operations, "prove": prove}, _tokenizers)
