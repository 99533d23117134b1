"""Tokenises requests in helper processes, for several threads or greenlets at once.

Helpers are started on demand: one for short prompts, one for long prompts and for models whose template has timed out
before, so that a short prompt never waits for a long one, and one that checks constraints of answers. Each helper
processes one request at a time. A helper that exceeds the time limit is killed, its request fails, and the next request
starts a new one.

Under gevent, waiting greenlets do not block others, because gevent patches `socket`, `threading` and `subprocess`.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from array import array
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Self

from shared.constraints.parts import parts, refusal
from shared.errors import JobFailure, PromptRefused
from shared.jobs.inputs import pack_inputs
from shared.jobs.request import Request
from shared.models.registry import ModelCard
from shared.tokenizing.inputs import given_inputs, helper_fields
from shared.tokenizing.inputs import refusal as refusal_of_input
from shared.tokenizing.messages import (
    Tokenized,
    TokenizerFault,
    TokenizerSource,
    receive,
    request_fields,
    send,
)

MODULE: Final = "shared.tokenizing.helper"
CHECK_MODULE: Final = "shared.constraints.helper"
_ROOT: Final = Path(__file__).resolve().parents[2]
_LONG: Final = 64 * 2**10
"""Minimum characters of a long prompt; tokenising this many takes about 50 ms."""
_PER_CHARACTER_S: Final = 5.0 / 2**20
"""Additional time limit per character: seven times what a tokenizer needs on an idle machine."""
_START_S: Final = 60.0
"""Time limit for starting a helper (0.1 s on an idle machine) and for loading a tokenizer (up to 2 s)."""
_MAX_WAIT: Final = 3
"""Maximum wait for a free helper, as a multiple of the request's time limit."""
_MAX_CHECKED: Final = 10_000
"""Hashes of valid constraints to remember."""
_ENVIRONMENT: Final = ("PATH", "HOME", "TMPDIR", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH")
"""Environment variables that a helper inherits. None of them may contain a secret."""


class TokenizerError(Exception):
    """A prompt could not be tokenised, for a reason other than the prompt."""


class TokenizerBroken(TokenizerError):
    """The model's tokenizer cannot be used from this source."""


class TokenizerCorrupt(TokenizerError):
    """The tokenizer's file is missing or damaged and must be fetched again."""


class TokenizerBusy(TokenizerError):
    """Too many prompts are waiting, or a helper cannot be started. A retry may succeed."""


class Tokenizing:
    """Tokenises requests. Thread-safe.

    Args:
        timeout_s: time limit for template and tokenizer together, without the wait for a free helper. It is extended by
            5 s per 2**20 characters of the prompt.
        module: the helper's module; a worker's helper can also read model folders.
        special_tokens_in_text: whether special tokens in messages are tokens, not text.
    """

    def __init__(self, timeout_s: float, module: str = MODULE, *, special_tokens_in_text: bool = False) -> None:
        self._timeout_s = timeout_s
        self._special_tokens = special_tokens_in_text
        self._short, self._long = _HelperQueue(module), _HelperQueue(module)
        self._checks = _HelperQueue(CHECK_MODULE)
        self._slow: set[int] = set()
        self._checked: OrderedDict[int, None] = OrderedDict()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def tokenize(
        self,
        source: TokenizerSource,
        request: Request,
        *,
        context: int | None = None,
        reserved: int = 0,
        vocabulary: int | None = None,
    ) -> Tokenized:
        """Tokenise the prompt of a request.

        Args:
            context: the model's context in tokens, at least one of which is for the answer; None for no limit.
            reserved: tokens of the context that images occupy, in addition to one placeholder each.
            vocabulary: number of tokens that the model's embedding has; None if unknown.

        Raises:
            PromptRefused: the prompt is too long or has a token that the embedding does not have, or the model's
                template rejected it or timed out.
            TokenizerError: the tokenizer or its helper failed.
        """
        max_tokens = None if context is None else max(0, context - 1 - reserved)
        limits = {"max_tokens": max_tokens, "vocabulary": vocabulary, "special_tokens": self._special_tokens}
        content = request_fields(request)
        fields = {"source": source.to_dict(), **limits, **content}
        header, payload = self._call("tokenize", fields, _size(content))
        _raise_error(header, context, reserved)
        return Tokenized(tuple(array("I", payload)), int(header["shared"]))

    def tokenize_inputs(self, source: TokenizerSource, request: Request, card: ModelCard) -> tuple[int, ...]:
        """Tokenise the inputs of an embedding or rerank job; return them packed (`shared.jobs.inputs`).

        Raises:
            PromptRefused: an input is too long.
            TokenizerError: the tokenizer or its helper failed.
        """
        if (given := given_inputs(request, card)) is not None:
            return pack_inputs(given)
        fields = helper_fields(request, card)
        header, payload = self._call("inputs", {"source": source.to_dict(), **fields}, _size(fields["texts"]))
        if "index" in header:
            raise refusal_of_input(request, card, header["index"], header["tokens"])
        _raise_error(header, card.context, 0)
        return tuple(array("I", payload))

    def _call(self, operation: str, fields: dict[str, Any], size: int) -> tuple[dict[str, Any], bytes]:
        """Call the helper for texts of this many characters."""
        model = hash(str(fields["source"]))
        helpers = self._long if model in self._slow or size >= _LONG else self._short
        limit_s = self._timeout_s + size * _PER_CHARACTER_S
        try:
            return helpers.call(operation, fields, limit_s)
        except _TimedOut as error:
            self._slow.add(model)
            message = f"The model's chat template and tokenizer took more than {limit_s:.3g} s for this prompt."
            raise PromptRefused(JobFailure.TEMPLATE, message) from error
        except _Crashed as error:
            message = "The model's chat template or tokenizer crashed twice on this prompt."
            raise PromptRefused(JobFailure.TEMPLATE, message) from error

    def load(self, source: TokenizerSource) -> None:
        """Start the helper for short prompts and load a tokenizer, so that the first prompt does not wait for that.

        Raises:
            TokenizerError: the tokenizer or its helper failed.
        """
        try:
            header, _ = self._short.call("load", {"source": source.to_dict()}, _START_S)
        except (_TimedOut, _Crashed) as error:
            raise TokenizerBroken(f"the tokenizer could not be loaded: {error!r}") from error
        if "error" in header:
            raise TokenizerBroken(str(header.get("message")))

    def check_constraints(self, request: Request) -> None:
        """Check that the constraints of a request's answer can be honoured: a hostile one may crash its process.

        Raises:
            PromptRefused: one cannot be honoured.
            TokenizerError: the helper failed.
        """
        unknown = [part for part in parts(request) if hash(part.constraint) not in self._checked]
        if not unknown:
            return
        fields = {"constraints": [(part.constraint.kind, part.constraint.source) for part in unknown]}
        try:
            header, _ = self._checks.call("check", fields, self._timeout_s)
        except _TimedOut as error:
            raise refusal(unknown[0].field, f"checking it took more than {self._timeout_s:.3g} s") from error
        except _Crashed as error:
            raise refusal(unknown[0].field, "it is too complex") from error
        if "error" in header:
            raise refusal(unknown[header.get("index", 0)].field, header.get("message"))
        for part in unknown:
            self._checked[hash(part.constraint)] = None
        while len(self._checked) > _MAX_CHECKED:
            with suppress(KeyError):  # another thread removed it
                self._checked.popitem(last=False)

    def call(self, operation: str, fields: Mapping[str, Any], limit_s: float) -> dict[str, Any]:
        """Call another operation of the helper and return the header of its reply.

        Raises:
            TokenizerError: there was no reply, or it is an error.
        """
        try:
            header, _ = self._long.call(operation, fields, limit_s)
        except (_TimedOut, _Crashed) as error:
            raise TokenizerBroken(f"the tokenizer helper did not reply: {error!r}") from error
        if "error" in header:
            raise TokenizerBroken(str(header.get("message")))
        return header

    def close(self) -> None:
        """Stop the helpers. A later request starts new ones."""
        for helpers in (self._short, self._long, self._checks):
            helpers.close()


class _TimedOut(Exception):
    """The helper did not reply in time."""


class _Crashed(Exception):
    """The helper ended during a request and during its retry."""


class _HelperQueue:
    """One helper process, which requests use one after another."""

    def __init__(self, module: str) -> None:
        self._module = module
        self._lock = threading.Lock()
        self._helper: _Helper | None = None

    def call(self, operation: str, fields: Mapping[str, Any], limit_s: float) -> tuple[dict[str, Any], bytes]:
        if not self._lock.acquire(timeout=_MAX_WAIT * limit_s):
            raise TokenizerBusy("too many prompts are waiting to be tokenised")
        try:
            return self._call({"op": operation, "limit_s": limit_s, **fields}, limit_s)
        finally:
            self._lock.release()

    def _call(self, request: dict[str, Any], limit_s: float) -> tuple[dict[str, Any], bytes]:
        """Send a request, and retry once: the helper may have ended between two requests."""
        for _ in range(2):
            helper = self._helper = self._helper or _Helper(self._module)
            try:
                return helper.load(request.get("source")) or helper.call(request, time.monotonic() + limit_s)
            except EOFError:
                self._kill()
            except TimeoutError as error:
                self._kill()
                raise _TimedOut from error
            except BaseException:
                self._kill()  # otherwise the next request would read the reply to this one
                raise
        raise _Crashed

    def close(self) -> None:
        with self._lock:
            self._kill()

    def _kill(self) -> None:
        helper, self._helper = self._helper, None
        if helper is not None:
            helper.close()


class _Helper:
    """A helper process.

    Raises:
        TokenizerBusy: it cannot be started.
    """

    def __init__(self, module: str) -> None:
        self._loaded: set[str] = set()
        self._socket, helpers_end = socket.socketpair()
        try:
            with helpers_end:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", module],
                    stdin=helpers_end.fileno(),
                    stdout=subprocess.DEVNULL,
                    env=_environment(),
                )
        except OSError as error:
            self._socket.close()
            raise TokenizerBusy(f"the tokenizer helper cannot be started: {error}") from error
        try:
            receive(self._socket, time.monotonic() + _START_S)
        except (EOFError, OSError) as error:
            self.close()
            raise TokenizerBusy(f"the tokenizer helper did not start: {error}") from error
        except BaseException:
            self.close()
            raise

    def load(self, source: dict[str, Any] | None) -> tuple[dict[str, Any], bytes] | None:
        """Load a tokenizer unless it is loaded, so that loading does not count against a request's time limit.

        Returns:
            The reply if it is an error, else None.

        Raises:
            EOFError, TimeoutError: as in `call`.
        """
        name = str(source)
        if source is None or name in self._loaded:
            return None
        request = {"op": "load", "limit_s": _START_S, "source": source}
        reply = self.call(request, time.monotonic() + _START_S)
        if "error" in reply[0]:
            return reply
        self._loaded.add(name)
        return None

    def call(self, request: dict[str, Any], deadline: float) -> tuple[dict[str, Any], bytes]:
        """Send a request and return the reply.

        Raises:
            EOFError: the helper has ended.
            TimeoutError: there is no reply by the deadline (`time.monotonic`).
        """
        self._socket.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            send(self._socket, request)
        except ConnectionError as error:
            raise EOFError("the helper has ended") from error
        return receive(self._socket, deadline)

    def close(self) -> None:
        """Kill the process."""
        self._socket.close()
        with suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait()


def _environment() -> dict[str, str]:
    inherited = {name: value for name in _ENVIRONMENT if (value := os.environ.get(name)) is not None}
    return inherited | {
        "PYTHONPATH": str(_ROOT),
        "HF_HUB_OFFLINE": "1",  # a tokenizer must be complete in its folder
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }


def _size(content: Any) -> int:
    """Total characters of all strings in a JSON value."""
    if isinstance(content, str):
        return len(content)
    if isinstance(content, Mapping):
        return sum(map(_size, content.values()))
    return sum(map(_size, content)) if isinstance(content, list | tuple) else 0


def _raise_error(header: Mapping[str, Any], context: int | None, reserved: int) -> None:
    """Raise the error that a reply reports, if there is one."""
    match header.get("error"):
        case None:
            return
        case JobFailure.CONTEXT_LENGTH:
            tokens = header.get("tokens")
            length = f": it has {tokens + reserved}, and the answer needs at least 1" if isinstance(tokens, int) else ""
            images = f" Its images take more than {reserved} tokens." if reserved else ""
            message = f"The prompt is longer than the model's context of {context} tokens{length}.{images}"
            raise PromptRefused(JobFailure.CONTEXT_LENGTH, message)
        case TokenizerFault.CORRUPT:
            raise TokenizerCorrupt(str(header.get("message")))
        case TokenizerFault.UNUSABLE:
            raise TokenizerBroken(str(header.get("message")))
        case code:
            field = header.get("field")
            raise PromptRefused(str(code), str(header.get("message")), None if field is None else str(field))
