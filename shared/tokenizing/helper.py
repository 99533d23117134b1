"""The helper process: `python -P -m shared.tokenizing.helper`, with a socket to its client as standard input.

It tokenises one request at a time and ends with its client. A template or tokenizer that needs too much time or memory
affects only this process: the client kills it and starts a new one. The process has no secrets and no settings, and the
client accepts only token ids and messages from it.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import sys
from array import array
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from shared.errors import JobFailure
from shared.jobs.inputs import pack_inputs
from shared.tokenizing.chat_tokenizer import CannotTokenize, ChatTokenizer, FileTokenizer, TooLong, tokenize
from shared.tokenizing.input_tokenizer import TooLong as InputTooLong
from shared.tokenizing.input_tokenizer import tokenize_inputs
from shared.tokenizing.messages import TokenizerFault, TokenizerSource, receive, send

MEMORY_BYTES: Final = 4 * 2**30
"""Memory limit of a helper. A prompt of 7 MB (2.4 million tokens) needs 1.2 GB."""
_MAX_GROWTH_BYTES: Final = 512 * 2**20
"""A helper that has grown by more than this ends after its reply; the next request starts a new one."""
_MAX_TOKENIZERS: Final = 4
_GRACE_S: Final = 1.0
"""The client kills a helper at its time limit. If the client is dead, the helper ends itself this much later."""

Reply = tuple[dict[str, Any], bytes]
Operation = Callable[[Mapping[str, Any]], Reply]
Loader = Callable[[TokenizerSource], ChatTokenizer]


class Tokenizers:
    """An LRU cache of loaded tokenizers, and the operations that use it.

    Attributes:
        peak_bytes: peak memory of the process when the last tokenizer was loaded.
    """

    def __init__(self, load: Loader = FileTokenizer.load) -> None:
        self._load = load
        self._loaded: OrderedDict[str, ChatTokenizer] = OrderedDict()
        self.peak_bytes = 0

    def load(self, request: Mapping[str, Any]) -> Reply:
        """The operation `load`: load a tokenizer."""
        self._tokenizer(request["source"])
        return {}, b""

    def tokenize(self, request: Mapping[str, Any]) -> Reply:
        """The operation `tokenize`: replies with `shared` in the header and the token ids in the payload."""
        ids, shared = tokenize(self._tokenizer(request["source"]), request)
        return {"shared": shared}, array("I", ids).tobytes()

    def inputs(self, request: Mapping[str, Any]) -> Reply:
        """The operation `inputs`: replies with the inputs in the payload (`shared.jobs.inputs.pack_inputs`)."""
        tokenizer = self._tokenizer(request["source"])
        if not isinstance(tokenizer, FileTokenizer):
            raise CannotTokenize(TokenizerFault.UNUSABLE, "inputs are tokenised only from a tokenizer.json")
        try:
            return {}, array("I", pack_inputs(tokenize_inputs(tokenizer, request))).tobytes()
        except InputTooLong as error:
            return {**_error(JobFailure.CONTEXT_LENGTH, "too long"), "index": error.index, "tokens": error.tokens}, b""

    def _tokenizer(self, fields: dict[str, Any]) -> ChatTokenizer:
        key = json.dumps(fields, sort_keys=True)
        if key not in self._loaded:
            self._loaded[key] = self._load(TokenizerSource(**fields))
            if len(self._loaded) > _MAX_TOKENIZERS:
                self._loaded.popitem(last=False)
            self.peak_bytes = peak_bytes()
        self._loaded.move_to_end(key)
        return self._loaded[key]


def reply(operations: Mapping[str, Operation], request: Mapping[str, Any]) -> Reply:
    """Run an operation and return its result or its error."""
    try:
        return operations[request["op"]](request)
    except CannotTokenize as error:
        return {**_error(error.code, str(error)), "field": error.field}, b""
    except TooLong as error:
        return {**_error(JobFailure.CONTEXT_LENGTH, "too long"), "tokens": error.tokens}, b""
    except MemoryError:
        return _error(JobFailure.TEMPLATE, "Tokenising the prompt needs too much memory."), b""
    except BaseException as error:  # noqa: BLE001 - panics of the tokenizer library are not Exceptions
        print(f"tokenizer helper: {type(error).__name__}: {error}", file=sys.stderr)
        return _error(JobFailure.TEMPLATE, "The prompt cannot be tokenised."), b""


def serve(operations: Mapping[str, Operation], tokenizers: Tokenizers) -> None:
    """Serve the client on standard input until it closes the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the client, and then this process
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    _limit_memory()
    client = socket.socket(fileno=os.dup(0))
    with suppress(EOFError, OSError):
        send(client, {})  # reports that the helper has started
        while not _has_grown(tokenizers):
            request, _ = receive(client)
            signal.setitimer(signal.ITIMER_REAL, request["limit_s"] + _GRACE_S)
            header, payload = reply(operations, request)
            send(client, header, payload)
            signal.setitimer(signal.ITIMER_REAL, 0)
    os._exit(os.EX_OK)  # a normal exit may fail because of the libraries' threads


def _error(code: str, message: str) -> dict[str, Any]:
    return {"error": code, "message": message}


def _limit_memory() -> None:
    with suppress(ValueError, OSError):  # fails if there is a lower limit already
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))


def peak_bytes() -> int:
    """Return the peak memory of this process.

    On Linux, `ru_maxrss` includes the size of the parent process at the fork; `VmHWM` does not.
    """
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _has_grown(tokenizers: Tokenizers) -> bool:
    return tokenizers.peak_bytes > 0 and peak_bytes() > tokenizers.peak_bytes + _MAX_GROWTH_BYTES


if __name__ == "__main__":
    _tokenizers = Tokenizers()
    serve({"load": _tokenizers.load, "tokenize": _tokenizers.tokenize, "inputs": _tokenizers.inputs}, _tokenizers)
