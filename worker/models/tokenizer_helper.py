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
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer

from shared.tokenizing.chat_tokenizer import CannotTokenize, ChatTokenizer, FileTokenizer, tokenize
from shared.tokenizing.files import TokenizerFiles
from shared.tokenizing.helper import Reply, Tokenizers, serve
from shared.tokenizing.messages import TokenizerFault, TokenizerSource, digest

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
_MAX_SPECIALS: Final = 16
_NO_CODE: Final = {"trust_remote_code": False}
"""The same as in `worker.models.load`, which a helper does not import because that imports Redis."""


class FolderTokenizer:
    """A model folder's tokenizer and chat template, loaded as mlx-lm and mlx-vlm load them."""

    def __init__(self, source: TokenizerSource) -> None:
        folder = Path(source.path)
        self.wrapper: Any = _tokenizer_utils().load(folder, dict(_NO_CODE), defaults=source.defaults)
        if source.vision and (template := _vision_template(folder)) is not None:
            self.wrapper.chat_template = template

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

    def plain(self, text: str, max_tokens: int | None) -> Sequence[int]:  # noqa: ARG002 - counted by the caller
        """See `ChatTokenizer`."""
        bos = self.wrapper.bos_token
        # As in mlx-lm: a prompt that begins with the BOS token gets no second one.
        ids: Sequence[int] = self.wrapper.encode(text, add_special_tokens=bos is None or not text.startswith(bos))
        return ids

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        max_tokens: int | None = None,  # noqa: ARG002 - counted by the caller
    ) -> Sequence[int]:
        """See `ChatTokenizer`."""
        ids: Sequence[int] = self.wrapper.apply_chat_template(
            list(messages), add_generation_prompt=add_generation_prompt
        )
        return ids


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
    file = FileTokenizer(TokenizerSource.of_card("", "", fields), Tokenizer.from_str(text))
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
    content = " ".join(texts[1:])
    turns = [{"role": role, "content": f"{role} {content}"} for role in ("system", "user", "assistant", "user")]
    conversations: list[list[dict[str, Any]]] = [
        [{"role": "user", "content": text}] for text in ("Hi", *texts[-2:], content)
    ]
    conversations += [turns[1:2], turns[:2], turns[1:], turns, [*turns, *turns[2:]], turns[:1], turns[:3]]
    conversations += [[*turns[:1], *turns[:2]], [turns[1], turns[1]], [{"role": "tool", "content": "x"}]]
    parts: list[dict[str, Any]] = [{"type": "text", "text": "What is this?"}, {"type": "text", "text": content}]
    if vision:
        parts = [{"type": "image"}, *parts, {"type": "image"}]
    conversations += [[{"role": "user", "content": parts}], [*turns[:1], {"role": "user", "content": parts}]]
    for messages in conversations:
        yield {"prompt": "", "messages": messages}


def _outcome(tokenizer: ChatTokenizer, probe: Mapping[str, Any]) -> tuple[object, ...]:
    try:
        ids, shared = tokenize(tokenizer, {**probe, "share_system_prompt": True})
    except Exception as error:  # noqa: BLE001 - both tokenizers must fail in the same way
        return type(error), str(error)
    return list(ids), shared


def _card_fields(wrapper: Any) -> dict[str, Any]:
    """Return the tokenizer's fields of a `ModelCard`."""
    template = wrapper.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    thinking = {wrapper._thinking_kwarg: wrapper.has_thinking}  # noqa: SLF001 - mlx-lm passes it to templates
    return {
        "chat_template": template if isinstance(template, str) else None,
        "bos_token": wrapper.bos_token,
        "eos_token": wrapper.eos_token,
        "template_variables": {**wrapper.special_tokens_map, **thinking},
    }


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
    serve({"load": _tokenizers.load, "tokenize": _tokenizers.tokenize, "prove": prove}, _tokenizers)
