"""A helper process: `python -P -m shared.tokenizing.helper`, with a socket to its client as standard input.

It tokenises one request at a time and ends with its client. A template or tokenizer that takes too long or too much
memory takes nothing but this process: the client kills it and starts another. It knows no password and no setting, and
its client takes nothing from it but token ids and messages.
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
from shared.tokenizing.encoder import ChatTokenizer, FileTokenizer, Refusal, TooLong, tokenize
from shared.tokenizing.messages import TokenizerSource, receive, send

MEMORY_BYTES: Final = 4 * 2**30
"""Memory limit of a helper; a prompt of 7 MB (2.4 million tokens) takes 1.2 GB."""
_KEPT_BYTES: Final = 512 * 2**20
"""A helper that has grown by more than this ends after its answer; the next request starts another."""
_MOST_TOKENIZERS: Final = 4
_GRACE_S: Final = 1.0
"""The client kills a late helper. If the client is dead, the helper ends itself this much later."""

Answer = tuple[dict[str, Any], bytes]
Operation = Callable[[Mapping[str, Any]], Answer]
Loader = Callable[[TokenizerSource], ChatTokenizer]


class Tokenizers:
    """An LRU cache of loaded tokenizers, and the operation that uses them."""

    def __init__(self, load: Loader = FileTokenizer.load) -> None:
        self._load = load
        self._loaded: OrderedDict[str, ChatTokenizer] = OrderedDict()
        self.peak_bytes = 0
        """Peak memory when the newest tokenizer was loaded."""

    def load(self, asked: Mapping[str, Any]) -> Answer:
        """The operation `load`: have a tokenizer ready."""
        self._tokenizer(asked["source"])
        return {}, b""

    def tokenize(self, asked: Mapping[str, Any]) -> Answer:
        """The operation `tokenize`: header `shared`, payload the ids."""
        ids, shared = tokenize(self._tokenizer(asked["source"]), asked)
        return {"shared": shared}, array("I", ids).tobytes()

    def _tokenizer(self, fields: dict[str, Any]) -> ChatTokenizer:
        key = json.dumps(fields, sort_keys=True)
        if key not in self._loaded:
            self._loaded[key] = self._load(TokenizerSource(**fields))
            if len(self._loaded) > _MOST_TOKENIZERS:
                self._loaded.popitem(last=False)
            self.peak_bytes = _peak_bytes()
        self._loaded.move_to_end(key)
        return self._loaded[key]


def answer(operations: Mapping[str, Operation], asked: Mapping[str, Any]) -> Answer:
    """The result of an operation, or its error."""
    try:
        return operations[asked["op"]](asked)
    except Refusal as refusal:
        return _error(refusal.code, str(refusal)), b""
    except TooLong as long:
        return {**_error(JobFailure.CONTEXT_LENGTH, "too long"), "tokens": long.tokens}, b""
    except MemoryError:
        return _error(JobFailure.TEMPLATE, "To tokenise the prompt took too much memory."), b""
    except BaseException as error:  # noqa: BLE001 - also what the tokenizer library panics with
        print(f"tokenizer helper: {type(error).__name__}: {error}", file=sys.stderr)
        return _error(JobFailure.TEMPLATE, "The prompt cannot be tokenised."), b""


def serve(operations: Mapping[str, Operation], tokenizers: Tokenizers) -> None:
    """Answer the client on standard input until it closes its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the client, which we follow
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    _bound_memory()
    client = socket.socket(fileno=os.dup(0))
    with suppress(EOFError, OSError):
        send(client, {})  # it has come up
        while not _has_grown(tokenizers):
            asked, _ = receive(client)
            signal.setitimer(signal.ITIMER_REAL, asked["limit_s"] + _GRACE_S)
            header, payload = answer(operations, asked)
            send(client, header, payload)
            signal.setitimer(signal.ITIMER_REAL, 0)
    os._exit(os.EX_OK)  # nothing is left to be written, and a library's threads may not end in peace


def _error(code: str, message: str) -> dict[str, Any]:
    return {"error": code, "message": message}


def _bound_memory() -> None:
    with suppress(ValueError, OSError):  # a lower limit than ours is as good
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))


def _peak_bytes() -> int:
    """Most memory that this process has held.

    Linux counts the size of the process that started this one into `ru_maxrss`, but not into `VmHWM`.
    """
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _has_grown(tokenizers: Tokenizers) -> bool:
    return tokenizers.peak_bytes > 0 and _peak_bytes() > tokenizers.peak_bytes + _KEPT_BYTES


if __name__ == "__main__":
    _tokenizers = Tokenizers()
    serve({"load": _tokenizers.load, "tokenize": _tokenizers.tokenize}, _tokenizers)
