"""Tokenising requests in helper processes, for many threads or greenlets at once.

Two helpers, started when they are needed: one for short prompts, one for long ones and for models whose template was
too slow before, so that a short prompt never waits for a long one. Each does one request at a time. One that is late
is killed, its request fails, and the next request starts another.

Under gevent this works by its patched `socket`, `threading` and `subprocess`: a waiting greenlet lets others run.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Self

from shared.errors import JobFailure, PromptRefused
from shared.jobs.request import Request
from shared.tokenizing.messages import (
    Tokenized,
    TokenizerFault,
    TokenizerSource,
    receive,
    request_fields,
    send,
)

MODULE: Final = "shared.tokenizing.helper"
_ROOT: Final = Path(__file__).resolve().parents[2]
_LONG: Final = 64 * 2**10
"""Characters from which a prompt counts as long: it takes about 50 ms."""
_PER_CHARACTER_S: Final = 5.0 / 2**20
"""Additional time per character: a tokenizer takes about a seventh of it on an idle machine."""
_START_S: Final = 60.0
"""Time limit for the start of a helper, and for loading a tokenizer; on an idle machine 0.1 s, and 2 s at most."""
_TURNS: Final = 3
"""Longest wait for a free helper, as a multiple of the request's time limit."""
_ENVIRONMENT: Final = ("PATH", "HOME", "TMPDIR", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH")
"""Environment variables passed to a helper; none of them may hold a password."""


class TokenizerError(Exception):
    """A prompt was not tokenised for a reason that is not its own."""


class TokenizerBroken(TokenizerError):
    """The model's tokenizer is not usable from this source."""


class TokenizerCorrupt(TokenizerError):
    """The tokenizer's file is missing or has the wrong content: fetch it again."""


class TokenizerBusy(TokenizerError):
    """Too many prompts wait, or no helper starts: try again later."""


class Tokenizing:
    """Tokenises requests; safe to be used by several threads.

    Args:
        timeout_s: time limit of template and tokenizer together, without the wait for a free helper. A prompt gets 5 s
            more per 2**20 characters.
        module: the helper's module; a worker's helper also reads model folders.
    """

    def __init__(self, timeout_s: float, module: str = MODULE) -> None:
        self._timeout_s = timeout_s
        self._short, self._long = _HelperQueue(module), _HelperQueue(module)
        self._slow: set[int] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def tokenize(
        self, source: TokenizerSource, request: Request, *, context: int | None = None, reserved: int = 0
    ) -> Tokenized:
        """A request's token ids.

        Args:
            context: the model's context in tokens, at least one of which is for the answer; None: no limit.
            reserved: tokens of the context that are taken by images, beyond one placeholder each.

        Raises:
            PromptRefused: the prompt is too long, or the model's template rejects it or takes too long.
            TokenizerError: the tokenizer or its helper failed, not the prompt.
        """
        most_tokens = None if context is None else max(0, context - 1 - reserved)
        asked = {"source": source.to_dict(), "most_tokens": most_tokens, **request_fields(request)}
        model = hash(str(asked["source"]))
        size = _size(request.prompt if request.messages is None else request.messages)
        helpers = self._long if model in self._slow or size >= _LONG else self._short
        limit_s = self._timeout_s + size * _PER_CHARACTER_S
        try:
            header, payload = helpers.ask("tokenize", asked, limit_s)
        except _Late as late:
            self._slow.add(model)
            message = f"The model's chat template and tokenizer took more than {limit_s:.3g} s for this prompt."
            raise PromptRefused(JobFailure.TEMPLATE, message) from late
        except _Died as died:
            message = "The process that templates and tokenises prompts died twice on this prompt."
            raise PromptRefused(JobFailure.TEMPLATE, message) from died
        _check(header, context, reserved)
        return Tokenized(tuple(array("I", payload)), int(header["shared"]))

    def ask(self, operation: str, fields: Mapping[str, Any], limit_s: float) -> dict[str, Any]:
        """The header with which a helper answers another operation.

        Raises:
            TokenizerError: there is no answer, or it is an error.
        """
        try:
            header, _ = self._long.ask(operation, fields, limit_s)
        except (_Late, _Died) as error:
            raise TokenizerBroken(f"no answer from the tokenizer helper: {error}") from error
        if "error" in header:
            raise TokenizerBroken(str(header.get("message")))
        return header

    def close(self) -> None:
        """End the helpers; a further request starts others."""
        self._short.close()
        self._long.close()


class _Late(Exception):
    """There was no answer in time."""


class _Died(Exception):
    """The helper ended over a request, twice."""


class _HelperQueue:
    """One helper at a time, and the requests that wait for it."""

    def __init__(self, module: str) -> None:
        self._module = module
        self._turn = threading.Lock()
        self._helper: _Helper | None = None

    def ask(self, operation: str, fields: Mapping[str, Any], limit_s: float) -> tuple[dict[str, Any], bytes]:
        if not self._turn.acquire(timeout=_TURNS * limit_s):
            raise TokenizerBusy("too many prompts wait to be tokenised")
        try:
            return self._ask({"op": operation, "limit_s": limit_s, **fields}, limit_s)
        finally:
            self._turn.release()

    def _ask(self, asked: dict[str, Any], limit_s: float) -> tuple[dict[str, Any], bytes]:
        """Ask, and retry once: the helper may have ended between two requests."""
        for _ in range(2):
            helper = self._helper = self._helper or _Helper(self._module)
            try:
                return helper.load(asked.get("source")) or helper.ask(asked, time.monotonic() + limit_s)
            except EOFError:
                self._end()
            except TimeoutError as error:
                self._end()
                raise _Late from error
            except BaseException:
                self._end()  # or the next request would read this one's answer
                raise
        raise _Died

    def close(self) -> None:
        with self._turn:
            self._end()

    def _end(self) -> None:
        helper, self._helper = self._helper, None
        if helper is not None:
            helper.close()


class _Helper:
    """A helper process.

    Raises:
        TokenizerBusy: it does not come up.
    """

    def __init__(self, module: str) -> None:
        self._loaded: set[str] = set()
        self._peer, theirs = socket.socketpair()
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", module],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    env=_environment(),
                )
        except OSError as error:
            self._peer.close()
            raise TokenizerBusy(f"no tokenizer helper can be started: {error}") from error
        try:
            receive(self._peer, time.monotonic() + _START_S)
        except (EOFError, OSError) as error:
            self.close()
            raise TokenizerBusy(f"the tokenizer helper does not come up: {error}") from error
        except BaseException:
            self.close()
            raise

    def load(self, source: dict[str, Any] | None) -> tuple[dict[str, Any], bytes] | None:
        """Have a tokenizer loaded, once: a request's own time is for its prompt. Returns the answer if it is an error.

        Raises:
            EOFError, TimeoutError: as `ask`.
        """
        name = str(source)
        if source is None or name in self._loaded:
            return None
        asked = {"op": "load", "limit_s": _START_S, "source": source}
        answer = self.ask(asked, time.monotonic() + _START_S)
        if "error" in answer[0]:
            return answer
        self._loaded.add(name)
        return None

    def ask(self, asked: dict[str, Any], deadline: float) -> tuple[dict[str, Any], bytes]:
        """Send a request, read the answer.

        Raises:
            EOFError: the helper has ended.
            TimeoutError: there is no answer by the deadline.
        """
        self._peer.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            send(self._peer, asked)
        except ConnectionError as error:
            raise EOFError("the helper is gone") from error
        return receive(self._peer, deadline)

    def close(self) -> None:
        """Kill the process."""
        self._peer.close()
        with suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait()


def _environment() -> dict[str, str]:
    kept = {name: value for name in _ENVIRONMENT if (value := os.environ.get(name)) is not None}
    return kept | {
        "PYTHONPATH": str(_ROOT),
        "HF_HUB_OFFLINE": "1",  # a tokenizer is what its folder holds
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


def _check(header: Mapping[str, Any], context: int | None, reserved: int) -> None:
    """Raise the error that an answer reports."""
    match header.get("error"):
        case None:
            return
        case JobFailure.CONTEXT_LENGTH:
            tokens = header.get("tokens")
            counted = f" with the answer: it has {tokens + reserved}" if isinstance(tokens, int) else ""
            message = f"The prompt is longer than the model's context of {context} tokens{counted}."
            raise PromptRefused(JobFailure.CONTEXT_LENGTH, message)
        case TokenizerFault.CORRUPT:
            raise TokenizerCorrupt(str(header.get("message")))
        case TokenizerFault.UNUSABLE:
            raise TokenizerBroken(str(header.get("message")))
        case code:
            raise PromptRefused(str(code), str(header.get("message")))
