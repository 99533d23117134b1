"""Which fields of a request need something that not every model or worker has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from shared.constraints.parts import is_strict, takes_text
from shared.jobs.request import EMBED, GENERATE, RERANK, Request
from shared.models.registry import ModelCard, WorkerProtocol

_ONLY_JSON: Final = frozenset({"mistral", "kimi_k2", "kimi_k3"})
"""Formats of tool calls in which arguments must be JSON."""


_ROUTES: Final = {EMBED: "/v1/embeddings", RERANK: "/v1/rerank"}


def wrong_kind(request: Request, model: str, kind: str) -> str | None:
    """Return why a model of this kind cannot do what the request needs; None if it can."""
    if request.kind == kind or (request.kind == GENERATE and kind not in _ROUTES):
        return None
    if kind in _ROUTES:
        return f"{model} does not generate text: it is for {_ROUTES[kind]}. Use another model."
    what = "compute embeddings" if request.kind == EMBED else "rank documents"
    return f"{model} does not {what}: its kind is {kind!r}. GET /v1/models lists the models with their kinds."


def unusable_option(request: Request, card: ModelCard) -> tuple[str, str] | None:
    """Return a field of an embedding or rerank request that the model cannot honour, and why; None if there is none."""
    if card.dimensions is not None and (request.dimensions or 0) > card.dimensions:
        return "dimensions", f"dimensions can be at most {card.dimensions} for {card.id}."
    if request.kind == EMBED and request.prompt_name is not None and request.prompt_name not in (card.prompts or {}):
        known = ", ".join(sorted(card.prompts or {})) or "none"
        return "prompt_name", f"{card.id} has no prompt {request.prompt_name!r}; it has: {known}."
    if request.instruction is not None and card.pair_template is None:
        return "instruction", f"{card.id} reads no instruction: only the query and a document. Leave out instruction."
    return None


def missing_capability(request: Request, card: ModelCard) -> tuple[str, str] | None:
    """Return a field of the request that the model cannot honour, and the reason; None if there is none.

    Cards of earlier versions do not say what their models can do, so nothing is missing.
    """
    if card.reasoning is None:
        return None
    if card.tool_format is None and _needs_tool_format(request):
        return "tools", "the model has no known format for tool calls"
    if not card.structured and (field := _constrained_field(request)):
        return field, "the model's tokenizer does not support constraints"
    if card.tool_format in _ONLY_JSON and any(takes_text(tool["function"]) for tool in request.tools or ()):
        return "tools", "grammars are not possible in the model's format of tool calls"
    if not card.reasoning and request.thinking_budget is not None:
        return "thinking_budget", "the model does not mark its reasoning"
    return None


def _constrained_field(request: Request) -> str | None:
    """Return a field that constrains the answer; None if it may have any form."""
    if request.constraint is not None:
        return "response_format"
    if request.tool_choice not in ("auto", "none"):
        return "tool_choice"
    strict = request.tool_choice == "auto" and any(is_strict(tool["function"]) for tool in request.tools or ())
    return "tools" if strict else None


def _needs_tool_format(request: Request) -> bool:
    """Whether tool calls are parsed or enforced. Otherwise the tools are only a part of the prompt."""
    if not request.tools or request.tool_choice == "none":
        return False
    return request.parse == "message" or _constrained_field(request) in ("tools", "tool_choice")


def adapter_problem(model: str, adapter: str, reason: str) -> str:
    """Return the message for an adapter that a model cannot use."""
    return f"{adapter} cannot be used with {model}: {reason}."


def newer_fields(request: Request) -> Iterator[tuple[str, WorkerProtocol]]:
    """Yield the fields of a request that older workers would ignore, with the protocol of those that do not.

    An older worker would take a request with inputs for one to generate: then the field is the model.
    """
    if request.kind != GENERATE:
        yield "model", WorkerProtocol.INPUTS
    names = {
        "tools": request.tools,
        "response_format": request.constraint,
        "thinking_budget": request.thinking_budget is not None,
        "logit_bias": request.logit_bias,
        "chat_template_kwargs": request.template_variables,
        "continue_final_message": request.continue_final,
    }
    yield from ((name, WorkerProtocol.OPTIONS) for name, value in names.items() if value)
    if request.adapter is not None:
        yield "adapter", WorkerProtocol.ADAPTERS
