"""Tokenises the inputs of embedding and rerank jobs, inside a helper process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from shared.jobs.inputs import Input
from shared.tokenizing.chat_tokenizer import FileTokenizer
from shared.tokenizing.messages import QUERY


class TooLong(Exception):
    """An input has too many tokens, or none.

    Attributes:
        index: of the input; `QUERY`: the query leaves no token for a document.
    """

    def __init__(self, index: int, tokens: int) -> None:
        super().__init__(index, tokens)
        self.index = index
        self.tokens = tokens


def tokenize_inputs(tokenizer: FileTokenizer, request: Mapping[str, Any]) -> Sequence[Input]:
    """Tokenise texts.

    Args:
        request: `shared.tokenizing.inputs.helper_fields`.

    Raises:
        TooLong: an input has too many tokens, or none.
    """
    texts, limit, truncate = request["texts"], request["max_tokens"], request["truncate"]
    if request["query"] is not None:
        _check_query(tokenizer, request["query"], request["around"], limit)
    if request["around"] is None:
        inputs = _whole(tokenizer.library, texts, limit if truncate else None)
    else:
        inputs = _between(tokenizer, texts, request["around"], limit if truncate else None)
    for index, each in enumerate(inputs):
        if not 0 < len(each.tokens) <= limit:
            raise TooLong(index, len(each.tokens))
    return inputs


def _check_query(tokenizer: FileTokenizer, query: str, around: Sequence[str] | None, limit: int) -> None:
    """Refuse a query with which the model would read nothing of a document.

    Args:
        query: all text before the document.
    """
    if around is None:
        tokens = len(tokenizer.library.encode(query, add_special_tokens=False).ids)
        tokens += tokenizer.library.num_special_tokens_to_add(is_pair=True)
    else:
        tokens = len(tokenizer.encode_as_text(query)) + sum(len(tokenizer.encode(text)) for text in around)
    if tokens >= limit:
        raise TooLong(QUERY, tokens)


def _whole(library: Tokenizer, texts: Sequence[str | list[str]], max_tokens: int | None) -> list[Input]:
    """Tokenise texts and pairs of texts, with the special tokens that the tokenizer adds.

    Args:
        max_tokens: cut longer inputs, pairs at the end of the second text; None: cut nothing.
    """
    sequences = [text if isinstance(text, str) else tuple(text) for text in texts]
    if max_tokens is not None:
        strategy = "longest_first" if isinstance(texts[0], str) else "only_second"
        library.enable_truncation(max_tokens, strategy=strategy)
    try:
        encoded = library.encode_batch_fast(sequences)
    finally:
        library.no_truncation()
    # Type 1 marks the second text of a pair.
    return [Input(tuple(each.ids), each.type_ids.index(1) if 1 in each.type_ids else 0) for each in encoded]


def _between(
    tokenizer: FileTokenizer, texts: Sequence[str], around: Sequence[str], max_tokens: int | None
) -> list[Input]:
    """Tokenise texts, each between two parts of a prompt, with the special tokens of these parts only."""
    head, tail = (tuple(tokenizer.encode(text)) for text in around)
    size = None if max_tokens is None else max(0, max_tokens - len(head) - len(tail))
    return [Input((*head, *tuple(tokenizer.encode_as_text(text))[:size], *tail)) for text in texts]
