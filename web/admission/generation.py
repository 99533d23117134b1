"""Build the generation request of a job from the body of an HTTP request: fill in defaults, and check model limits."""

from __future__ import annotations

import secrets
from typing import Any, Final

from shared.errors import Invalid, JobFailure
from shared.jobs.request import Request, Sampling
from shared.models.catalog import Catalog
from shared.models.registry import ModelCard
from shared.models.sampling_defaults import SamplingDefaults
from shared.settings import Settings
from shared.tokenizing.messages import Tokenized
from web.cluster.snapshot import Cluster
from web.schemas.requests import JobRequest, ParseOptions
from web.schemas.tools import choice_record

MAX_CONTEXT: Final = 2**31 - 1
"""Limit of `max_tokens` while the model's context is not known."""
RESERVED_TOKENS: Final = 1024
"""Tokens for which memory in Redis is reserved if a request has no `max_tokens`. Few answers are longer. Those that are
can still be written: while memory is scarce, only new jobs are refused."""


class GenerationRequests:
    """Builds the generation requests of jobs."""

    def __init__(self, settings: Settings, catalog: Catalog, cluster: Cluster) -> None:
        self._settings = settings
        self._catalog = catalog
        self._cluster = cluster

    def build(self, request: JobRequest, model: str, card: ModelCard | None, adapter: str | None = None) -> Request:
        """Return the generation request of a job, with all defaults filled in.

        Args:
            model: id of the requested model.
            card: the model's card; None if no worker has announced the model yet.
            adapter: the requested adapter of the model.

        Raises:
            Invalid: a value is not possible with this model.
        """
        _check_template_options(request)
        messages, parse = request.chat_messages(), request.parse
        return Request(
            model=model,
            max_tokens=self._max_tokens(request, model, card),
            sampling=self._sampling(request, model),
            prompt=None if messages else request.prompt,
            messages=messages,
            stop=tuple(request.stop),
            parse=parse.format if isinstance(parse, ParseOptions) else parse,
            coordinates=_coordinates(parse, card),
            share_system_prompt=request.share_system_prompt,
            logprobs=request.logprobs,
            raw=request.raw,
            tools=request.tool_records(),
            tool_choice=choice_record(request.tool_choice),
            parallel_tool_calls=request.parallel_tool_calls,
            template_variables=self._template_variables(request, model),
            continue_final=request.continue_final_message,
            thinking_budget=request.thinking_budget,
            constraint=request.response_format.constraint() if request.response_format else None,
            logit_bias=_logit_bias(request, card),
            adapter=adapter,
        )

    def _template_variables(self, request: JobRequest, model: str) -> dict[str, Any]:
        """Return the variables of the chat template: the request's, and the catalog's that it does not set."""
        entry = self._catalog.models.get(model)
        defaults = entry.chat_template_kwargs if entry and not request.skips_template else {}
        variables = {**defaults, **request.chat_template_kwargs}
        for name in ("enable_thinking", "reasoning_effort"):
            if (value := getattr(request, name)) is not None:
                variables[name] = value
        return variables

    def _max_tokens(self, request: JobRequest, model: str, card: ModelCard | None) -> int:
        """Return the maximum tokens of the answer. The worker limits it to the rest of the context."""
        entry = self._catalog.models.get(model)
        context_length = (card.context if card else entry.context_limit if entry else None) or MAX_CONTEXT
        if request.max_tokens is None:
            return min(self._default_max_tokens(model) or context_length, context_length)
        if request.max_tokens > context_length:
            detail = f"max_tokens can be at most {context_length}, the model's context length."
            raise Invalid(detail, field="max_tokens")
        return request.max_tokens

    def _default_max_tokens(self, model: str) -> int | None:
        entry = self._catalog.models.get(model)
        return (entry.sampling.max_tokens if entry else None) or self._settings.max_tokens

    def reserved_tokens(self, request: JobRequest, generation: Request) -> int | None:
        """Return the tokens for which memory is reserved; None for `max_tokens`."""
        is_limited = request.max_tokens is not None or self._default_max_tokens(generation.model) is not None
        return None if is_limited else min(generation.max_tokens, RESERVED_TOKENS)

    def _sampling(self, request: JobRequest, model: str) -> Sampling:
        defaults = self.sampling_defaults(model)

        def value(name: str) -> Any:
            """Return the request's value, otherwise the model's default, otherwise the API's default."""
            requested, default = getattr(request, name), getattr(defaults, name)
            omitted = requested is None or (default is not None and name not in request.model_fields_set)
            return default if omitted else requested

        temperature = value("temperature")
        return Sampling(
            temperature=self._settings.temperature if temperature is None else temperature,
            top_p=value("top_p"),
            top_k=value("top_k"),
            min_p=value("min_p"),
            repetition_penalty=value("repetition_penalty"),
            presence_penalty=value("presence_penalty"),
            frequency_penalty=value("frequency_penalty"),
            # Chosen here and stored, so that every attempt generates the same text.
            seed=secrets.randbits(63) if request.seed is None else request.seed,
        )

    def sampling_defaults(self, model: str) -> SamplingDefaults:
        """Return a model's defaults: the catalog's, then those that the model's files declare."""
        entry = self._catalog.models.get(model)
        card = self._cluster.snapshot().models.get(model)
        if card is not None and card.sampling is not None:
            declared = SamplingDefaults.of(card.sampling)
        else:
            declared = entry.declared_sampling if entry else SamplingDefaults()
        return entry.sampling.over(declared) if entry else declared


def _coordinates(parse: str | ParseOptions | None, card: ModelCard | None) -> str | None:
    """Return what the coordinates in the answer refer to, if the request says it."""
    coordinates = parse.coordinates if isinstance(parse, ParseOptions) else None
    if coordinates == "resized" and card is not None and card.geometry is None:
        detail = f"parse.coordinates cannot be 'resized': the size to which {card.id} resizes images is unknown."
        raise Invalid(detail, field="parse.coordinates")
    return coordinates


def _check_template_options(request: JobRequest) -> None:
    """Refuse options for the chat template if the prompt does not go through it."""
    if not request.skips_template:
        return
    for field in ("tools", "chat_template_kwargs", "enable_thinking", "reasoning_effort"):
        if getattr(request, field) not in (None, {}):
            what = "raw prompts" if request.raw else "prompt_tokens"
            raise Invalid(f"{field} cannot be used with {what}, which skip the chat template.", field=field)


def given_tokens(request: JobRequest, card: ModelCard | None) -> Tokenized | None:
    """Return the token ids that the request has in place of a text, after checking them; None if it has a text."""
    tokens = request.prompt_tokens
    if tokens is None:
        return None
    if card is not None and len(tokens) >= card.context:
        detail = (
            f"The prompt is longer than the model's context of {card.context} tokens: it has {len(tokens)}, and the "
            "answer needs at least 1."
        )
        raise Invalid(detail, code=JobFailure.CONTEXT_LENGTH, field="prompt_tokens")
    _check_token(max(tokens), card, f"prompt_tokens[{tokens.index(max(tokens))}]")
    return Tokenized(tuple(tokens))


def _logit_bias(request: JobRequest, card: ModelCard | None) -> tuple[tuple[int, float], ...]:
    """Return the biases by token id, unless the model has no such token."""
    biases = {int(token): bias for token, bias in request.logit_bias.items()}
    for token in biases:
        _check_token(token, card, f"logit_bias.{token}")
    return tuple(sorted(biases.items()))


def _check_token(token: int, card: ModelCard | None, field: str) -> None:
    """Refuse a token id that the model does not have."""
    vocabulary = card.vocabulary if card else None
    if vocabulary is not None and token >= vocabulary:
        raise Invalid(f"{field}: the model has no token {token}; its ids are 0 to {vocabulary - 1}.", field=field)
