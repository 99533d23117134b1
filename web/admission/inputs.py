"""Check requests for embeddings and rankings, and tokenise their inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from shared.errors import Invalid
from shared.jobs.inputs import MAX_NUMBERS
from shared.jobs.request import EMBED, Request
from shared.jobs.submission import USUAL_DIMENSIONS, inputs_bytes
from shared.models.capabilities import unusable_option, wrong_kind
from shared.models.registry import ModelCard
from web.admission.capabilities import check_workers
from web.admission.prompt_tokenizer import PromptTokenizer
from web.cluster.snapshot import Cluster
from web.schemas.inputs import InputsRequest

_MAX_REPEATED: Final = 16 * 2**20
"""Maximum characters of query and instruction in all pairs with a document: each pair has a copy of them."""


@dataclass(frozen=True, slots=True)
class AdmittedInputs:
    """A checked request.

    Attributes:
        tokens: token ids of the inputs, packed; None if the worker has to tokenise them.
        result_bytes: maximum size of the results as text.
    """

    request: Request
    tokens: tuple[int, ...] | None
    result_bytes: int


class InputRequests:
    """Checks requests with inputs instead of a prompt."""

    def __init__(self, cluster: Cluster, prompt_tokenizer: PromptTokenizer) -> None:
        self._cluster = cluster
        self._prompt_tokenizer = prompt_tokenizer

    def admit(self, body: InputsRequest, model: str, kind: str | None, card: ModelCard | None) -> AdmittedInputs:
        """Check a request for a model.

        Args:
            kind: the model's kind; None if it is not known.
            card: None if no worker has announced the model yet. Then the worker checks the inputs.

        Raises:
            Invalid: the model cannot do this, or an input is too long.
            Unavailable: a worker of an earlier version has the model.
        """
        request = body.to_request(model)
        check_kind(request, kind)
        check_workers(request, self._cluster.snapshot())
        if card is not None:
            _check_options(request, card)
        _check_pairs(request)
        _check_size(body, request, card)
        tokens = None if card is None else self._prompt_tokenizer.tokenize_inputs(card, request, body.inputs_field)
        return AdmittedInputs(request, tokens, inputs_bytes(request, card.dimensions if card else None))


def check_kind(request: Request, kind: str | None) -> None:
    """Refuse a request for a model of another kind.

    Args:
        kind: the model's kind; None if it is not known.

    Raises:
        Invalid: the model cannot do what the request needs.
    """
    if kind is not None and (reason := wrong_kind(request, request.model, kind)):
        raise Invalid(reason, code="not_supported", field="model")


def _check_pairs(request: Request) -> None:
    """Refuse a request whose pairs would take far more memory than its body."""
    repeated = len(request.query or "") + len(request.instruction or "")
    if repeated * len(request.inputs) > _MAX_REPEATED:
        detail = (
            f"query: query and instruction, repeated for each of {len(request.inputs)} documents, have more than "
            f"{_MAX_REPEATED:,} characters in all. Shorten them or send fewer documents."
        )
        raise Invalid(detail, field="query")


def _check_size(body: InputsRequest, request: Request, card: ModelCard | None) -> None:
    """Refuse a request whose vectors together are too large for an answer."""
    count, size = len(request.inputs), request.dimensions or (card.dimensions if card else None) or USUAL_DIMENSIONS
    if request.kind == EMBED and count * size > MAX_NUMBERS:
        field = body.inputs_field
        detail = f"{field}: {count} vectors of {size} numbers are more than the limit of {MAX_NUMBERS:,} numbers."
        raise Invalid(f"{detail} Send fewer inputs in a request.", field=field)


def _check_options(request: Request, card: ModelCard) -> None:
    """Refuse options that the model does not have."""
    if unusable := unusable_option(request, card):
        field, reason = unusable
        raise Invalid(reason, code="not_supported" if field == "instruction" else "invalid_request", field=field)
