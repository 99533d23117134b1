"""Converts the byte-level BPE tokenizer in a GGUF's metadata to Hugging Face's tokenizer files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_SPECIAL = 3
"""GGUF's token type for control tokens."""


def tokenizer_json(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of `tokenizer.json`.

    Digits are split one by one before the byte level, as the value `smollm` of `tokenizer.ggml.pre` demands.

    Raises:
        ValueError: the metadata describes another kind of tokenizer.
    """
    kind = (metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"cannot convert a tokenizer of kind {kind[0]}/{kind[1]}")
    tokens: Sequence[str] = metadata["tokenizer.ggml.tokens"]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(i, tokens[i]) for i in special_ids(metadata)],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in metadata["tokenizer.ggml.merges"]],
        },
    }


def tokenizer_config(metadata: Mapping[str, Any], context: int) -> dict[str, Any]:
    """Return the content of `tokenizer_config.json`, which includes the chat template."""
    tokens: Sequence[str] = metadata["tokenizer.ggml.tokens"]

    def token(role: str) -> str:
        return tokens[int(metadata[f"tokenizer.ggml.{role}_token_id"])]

    return {
        # This class uses tokenizer.json unchanged; GPT2Tokenizer would replace the pre-tokenizer.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {str(i): _decoder_entry(tokens[i]) for i in special_ids(metadata)},
        "bos_token": token("bos"),
        "eos_token": token("eos"),
        "pad_token": token("padding"),
        "unk_token": token("unknown"),
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        "chat_template": metadata["tokenizer.chat_template"],
    }


def special_ids(metadata: Mapping[str, Any]) -> list[int]:
    """Return the ids of the control tokens in order."""
    return [i for i, kind in enumerate(metadata["tokenizer.ggml.token_type"].tolist()) if kind == _SPECIAL]


def _added(token_id: int, content: str) -> dict[str, Any]:
    return {"id": token_id, **_decoder_entry(content)}


def _decoder_entry(content: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"content": content, **flags, "special": True}
