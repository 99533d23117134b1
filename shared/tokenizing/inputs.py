"""What a tokenizer helper needs of an embedding or rerank request: texts, pairs of texts, and prompts around them.

`shared.tokenizing.input_tokenizer` is the helper's side.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple, TypeAlias

from shared.errors import JobFailure, PromptRefused
from shared.jobs.inputs import Input
from shared.jobs.request import RERANK, Request
from shared.models.registry import ModelCard
from shared.tokenizing.messages import QUERY

QWEN3_RERANKER: Final = "qwen3_reranker"
"""The template of Qwen3-Reranker, which answers "yes" or "no"."""

Text: TypeAlias = "str | list[str]"
"""A text, or a pair of texts."""


class _Template(NamedTuple):
    """The text around a pair. The special tokens are only in `head` and `tail`."""

    head: str
    body: str
    tail: str
    instruction: str


_TEMPLATES: Final = {
    QWEN3_RERANKER: _Template(
        head="<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct"
        ' provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n',
        body="<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}",
        tail="<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        instruction="Given a web search query, retrieve relevant passages that answer the query",
    )
}


def input_field(request: Request, index: int) -> str:
    """Return the name of the request field that has an input."""
    if request.kind == RERANK:
        return f"documents[{index}]"
    return f"input[{index}]" if len(request.inputs) > 1 else "input"


def given_inputs(request: Request, card: ModelCard) -> tuple[Input, ...] | None:
    """Return the inputs of a request that has token ids, after checking them; None if it has texts.

    Raises:
        PromptRefused: an input is too long, or has a token that the model does not have.
    """
    ids = [each for each in request.inputs if not isinstance(each, str)]
    if not ids:
        return None
    inputs = [each[: card.context] if request.truncate else each for each in ids]
    for index, tokens in enumerate(inputs):
        if len(tokens) > card.context:
            raise refusal(request, card, index, len(tokens))
        if card.vocabulary is not None and (unknown := max(tokens)) >= card.vocabulary:
            field = input_field(request, index)
            message = f"{field}: the model has no token {unknown}; its ids are 0 to {card.vocabulary - 1}."
            raise PromptRefused(JobFailure.TEMPLATE, message, field)
    return tuple(Input(tokens) for tokens in inputs)


def refusal(request: Request, card: ModelCard, index: int, tokens: int) -> PromptRefused:
    """Return the error for an input that has too many tokens, or none.

    Args:
        index: of the input; `QUERY`: the query leaves no token for a document.
    """
    if index == QUERY:
        message = f"query takes {tokens} tokens and leaves none for a document; the model reads at most {card.context}."
        return PromptRefused(JobFailure.CONTEXT_LENGTH, f"{message} Shorten it.", "query")
    field = input_field(request, index)
    if not tokens:
        return PromptRefused(JobFailure.TEMPLATE, f"{field} has no tokens: the model would read nothing.", field)
    together = " together with the query" if request.kind == RERANK else ""
    limit = f"the model reads at most {card.context}"
    message = f"{field} has {tokens} tokens{together}; {limit}. Shorten it, or set truncate to cut it."
    return PromptRefused(JobFailure.CONTEXT_LENGTH, message, field)


def helper_fields(request: Request, card: ModelCard) -> dict[str, Any]:
    """Return the fields of a helper's operation `inputs`."""
    template = _TEMPLATES.get(card.pair_template or "")
    return {
        "texts": _texts(request, card, template),
        "around": None if template is None else [template.head, template.tail],
        "max_tokens": card.context,
        "truncate": request.truncate,
        "query": _before_document(request, template) if request.kind == RERANK else None,
    }


def _before_document(request: Request, template: _Template | None) -> str:
    """Return the text that comes before each document."""
    return (request.query or "") if template is None else _body(request, template, "")


def _texts(request: Request, card: ModelCard, template: _Template | None) -> list[Text]:
    texts = [each for each in request.inputs if isinstance(each, str)]
    if request.kind != RERANK:
        prompt = (card.prompts or {}).get(request.prompt_name or card.default_prompt or "", "")
        return [prompt + text for text in texts]
    if template is None:
        return [[request.query or "", text] for text in texts]
    return [_body(request, template, text) for text in texts]


def _body(request: Request, template: _Template, document: str) -> str:
    instruction = request.instruction or template.instruction
    return template.body.format(instruction=instruction, query=request.query or "", document=document)
