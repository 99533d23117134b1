"""Constrained decoding: which tokens each row may generate next.

A row is constrained by a grammar (JSON schema, regular expression, …), which llguidance follows token by token, and by
a thinking budget, after which the tokens that end the reasoning are forced. A grammar begins after the reasoning.

The state of a row is a function of its prompt and its generated tokens, so a resumed row continues exactly.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final

from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer

from shared.constraints.grammar import ConstraintRefused, check_matcher, limits, short_message
from shared.constraints.parts import constraint_field, parts, refusal
from shared.errors import JobFailure, PromptRefused
from shared.jobs.request import Request
from worker.output.format import MessageFormat
from worker.runner.base import ConstraintFailed
from worker.runner.detokenizer import backend_tokenizer
from worker.runner.logits.answer_grammar import answer_grammar
from worker.runner.logits.thinking import ThinkMarkers, overlap

_MAX_COMPILED: Final = 64
"""Compiled grammars to keep per model. One of a large schema takes a few MB."""


@dataclass(frozen=True, slots=True)
class RowConstraint:
    """The constraint of a request, compiled for a model. Immutable, so any thread may use it.

    Attributes:
        grammar: a matcher in its initial state; None: only the reasoning is limited.
        markers: None if the model does not reason.
        budget: maximum reasoning tokens; None: no limit.
        eos: end-of-sequence tokens.
        may_think: whether the model may begin a reasoning that the prompt has not begun.
        words: number of 32-bit words in a mask of the grammar.
    """

    grammar: LLMatcher | None
    markers: ThinkMarkers | None
    budget: int | None
    eos: frozenset[int]
    may_think: bool = True
    words: int = 0

    def start(self, prompt: Sequence[int], generated: Sequence[int]) -> Guide:
        """Return the state of a row after its prompt and the tokens that were generated before."""
        guide = Guide(self, thinking=self.markers is not None and self.markers.is_open(prompt))
        for token in generated:
            guide.advance(token)
        return guide


class Guide:
    """The state of a constrained row. Belongs to the engine thread.

    Attributes:
        error: why the row cannot continue; None if it can.
        matcher: follows the grammar; None if there is none.
        eos: end-of-sequence tokens.
        words: number of 32-bit words in a mask of the grammar.
    """

    def __init__(self, constraint: RowConstraint, *, thinking: bool) -> None:
        self.error: ConstraintFailed | None = None
        self.matcher = constraint.grammar.deep_copy() if constraint.grammar else None
        self.eos = sorted(constraint.eos)
        self.words = constraint.words
        self._constraint = constraint
        markers = constraint.markers
        self._whole = markers is not None and markers.whole
        self._thinking = thinking
        self._may_think = constraint.may_think and markers is not None and not thinking
        self._reasoning_tokens = 0
        self._recent: deque[int] = deque(maxlen=_longest_marker(constraint.markers))
        self._forced: deque[int] = deque()
        self._ended = False
        self._limit_reasoning()

    @property
    def forced(self) -> int | None:
        """The only token that may come next; None if there is a choice."""
        return self._forced[0] if self._forced else None

    @property
    def follows_grammar(self) -> bool:
        """Whether the grammar decides about the next token."""
        return not (self._ended or self._forced or self._before_grammar) and self.matcher is not None

    @property
    def must_not_end(self) -> bool:
        """Whether all tokens may come next but those that end the answer: the grammar has not begun."""
        return self._before_grammar and not self._forced and not self._ended and self.matcher is not None

    @property
    def think_start(self) -> int | None:
        """A token that may come next in addition to those of the grammar; None if there is none."""
        markers = self._constraint.markers
        opens = markers is not None and self._may_think and not self._whole and self.matcher is not None
        return markers.start[0] if markers and opens else None

    @property
    def _before_grammar(self) -> bool:
        return self._thinking and not self._whole

    def advance(self, token: int) -> None:
        """Record the row's next token."""
        if self.error is not None or self._ended:
            return
        if token in self._constraint.eos and not self._forced:
            self._ended = True
            return
        if self._forced:
            self._forced.popleft()
        self._recent.append(token)
        if self._whole:
            self._answer(token)
        if self._thinking:
            self._reason()
        elif not self._begin_reasoning(token) and not self._whole:
            self._answer(token)

    def check(self) -> None:
        """Set `error` if the grammar exceeded a limit of llguidance."""
        if self.matcher is not None and self.matcher.is_error():
            self.error = ConstraintFailed(short_message(self.matcher.get_error()))

    def _reason(self) -> None:
        markers = self._constraint.markers
        if markers and overlap(self._recent, markers.end) == len(markers.end):
            self._thinking = False
            self._may_think = self.matcher is None or self._whole
            self._recent.clear()
            return
        self._reasoning_tokens += 1
        self._limit_reasoning()

    def _limit_reasoning(self) -> None:
        """Force the end of the reasoning when the budget is used up."""
        markers, budget = self._constraint.markers, self._constraint.budget
        if self._thinking and markers and budget is not None and self._reasoning_tokens >= budget and not self._forced:
            self._forced.extend(self._forced_end(markers)[overlap(self._recent, markers.end) :])

    def _forced_end(self, markers: ThinkMarkers) -> tuple[int, ...]:
        # With a grammar of all messages, the grammar decides which message may follow.
        return markers.end if self._whole and self.matcher is not None else markers.forced

    def _begin_reasoning(self, token: int) -> bool:
        """Return whether a token belongs to the marker that begins the reasoning."""
        markers = self._constraint.markers
        if markers is None or not self._may_think:
            return False
        found = overlap(self._recent, markers.start)
        if found == len(markers.start):
            self._thinking, self._may_think = True, False
            self._recent.clear()
            self._limit_reasoning()
            return True
        if self.matcher is None or self._whole:
            return False
        if found and not self._forced and token == markers.start[0]:
            self._forced.extend(markers.start[1:])  # nothing but the marker may follow: the grammar has not begun
        self._may_think = bool(self._forced)
        return self._may_think

    def _answer(self, token: int) -> None:
        if self.matcher is not None and not self.matcher.consume_token(token):
            self.error = ConstraintFailed(short_message(self.matcher.get_error()))


class ConstraintCompiler:
    """Compiles the constraints of a model's requests. Any thread may use it.

    Args:
        tokenizer: mlx-lm's wrapper of the tokenizer.
        form: how the model marks reasoning and tool calls.
        vocabulary: number of tokens that the model has.
        eos: end-of-sequence tokens.
    """

    def __init__(self, tokenizer: Any, form: MessageFormat, vocabulary: int, eos: frozenset[int]) -> None:
        self._backend = backend_tokenizer(tokenizer)
        self._form = form
        self._eos = eos
        self._markers = ThinkMarkers.of(form, self._encode)
        size = max(vocabulary, self._backend.get_vocab_size() if self._backend else 0)
        self._size, self._words = size, (size + 31) // 32
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()

    @property
    def supported(self) -> bool:
        """Whether grammars work with the model's tokenizer."""
        return self._backend is not None and bool(self._eos)

    def compile(self, request: Request) -> RowConstraint | None:
        """Return the constraint of a request; None if it has none.

        Raises:
            PromptRefused: the constraint cannot be honoured.
        """
        budget = request.thinking_budget if self._markers is not None else None
        matcher = self._matcher(request) if self._is_constrained(request) else None
        if matcher is None and budget is None:
            return None
        thinks = request.template_variables.get("enable_thinking") is not False
        return RowConstraint(matcher, self._markers, budget, self._eos, thinks, self._words)

    @staticmethod
    def _is_constrained(request: Request) -> bool:
        return request.constraint is not None or request.tool_choice not in ("auto", "none") or bool(parts(request))

    def _matcher(self, request: Request) -> LLMatcher | None:
        """Return the matcher of a request's grammar; None if any text is allowed.

        Raises:
            PromptRefused: the grammar cannot be honoured.
        """
        field = "tools" if request.constraint is None else constraint_field(request.constraint)
        with self._lock:
            try:
                tokenizer = self._loaded_tokenizer()
                grammar = answer_grammar(request, self._form, self._marker)
                return None if grammar is None else self._compiled_grammar(tokenizer, grammar)
            except ConstraintRefused as refused:
                raise refusal(field, refused) from refused

    def _compiled_grammar(self, tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
        if (matcher := self._compiled.get(grammar)) is None:
            matcher = LLMatcher(tokenizer, grammar, limits=limits(), log_level=0)
            check_matcher(matcher)
            self._compiled[grammar] = matcher
            if len(self._compiled) > _MAX_COMPILED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        return matcher

    def _encode(self, text: str) -> tuple[int, ...]:
        ids = [] if self._backend is None else self._backend.encode(text, add_special_tokens=False).ids
        return tuple(ids)

    def _marker(self, text: str) -> str:
        """Return the Lark expression of a text with special tokens, see `answer_grammar`."""
        tokenizer = self._loaded_tokenizer()
        pieces: list[str] = []
        for special, group in groupby(self._encode(text), tokenizer.is_special_token):
            ids = list(group)
            pieces += [f"<[{token}]>" for token in ids] if special else [json.dumps(tokenizer.decode_str(ids))]
        return " ".join(pieces)

    def _loaded_tokenizer(self) -> LLTokenizer:
        if self._tokenizer is None:
            self._tokenizer = self._load_tokenizer()
        return self._tokenizer

    def _load_tokenizer(self) -> LLTokenizer:
        if self._backend is None or not self._eos:
            raise PromptRefused(JobFailure.CONSTRAINT, "This model's tokenizer does not support constraints.")
        copy = Tokenizer.from_str(self._backend.to_str())
        copy.no_padding()
        copy.no_truncation()
        try:
            return LLTokenizer(copy.to_str(), n_vocab=self._size, eos_token=sorted(self._eos))
        except ValueError as error:
            message = "This model's tokenizer does not support constraints."
            raise PromptRefused(JobFailure.CONSTRAINT, message) from error


def _longest_marker(markers: ThinkMarkers | None) -> int:
    return max(len(markers.start), len(markers.end)) if markers else 0
