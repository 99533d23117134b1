"""The inputs of an embedding or rerank job, tokenised, and its results as text.

A job's token ids are stored as one list of integers. Here that list holds all inputs: their number; for each of them
its length and the index of its second text; then the ids of all of them.

A result is a line `INDEX:BASE64`, with little-endian 32-bit floats: a vector, or one score. The job's text consists of
these lines, in the order in which the inputs were computed.
"""

from __future__ import annotations

import base64
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Final, NamedTuple

MAX_INPUTS: Final = 2048
"""Maximum inputs of a job; the limit of OpenAI's API."""
MAX_NUMBERS: Final = 4 * 2**20
"""Maximum numbers in all vectors of a job: 2,048 vectors with 2,048 dimensions."""
LINE_BYTES: Final = 16
"""Bytes of a result besides its numbers: index, colon, newline and padding, rounded up."""


class Input(NamedTuple):
    """A tokenised input.

    Attributes:
        second: index of the first token of the second text, for models that distinguish the two texts of a pair by
            their type; 0 if there is only one.
    """

    tokens: tuple[int, ...]
    second: int = 0


def pack_inputs(inputs: Sequence[Input]) -> tuple[int, ...]:
    """Encode inputs as one list of integers."""
    header = [len(inputs)]
    for each in inputs:
        header += (len(each.tokens), each.second)
    return (*header, *(token for each in inputs for token in each.tokens))


def unpack_inputs(packed: Sequence[int]) -> tuple[Input, ...]:
    """Decode the output of `pack_inputs`.

    Raises:
        ValueError: it is something else.
    """
    count = packed[0] if packed else -1
    start = 1 + 2 * count
    lengths, seconds = packed[1:start:2], packed[2:start:2]
    ends = list(accumulate(lengths, initial=start))
    if count < 1 or len(lengths) != count or ends[-1] != len(packed):
        raise ValueError("these are not the token ids of inputs")
    return tuple(
        Input(tuple(packed[begin:end]), second) for begin, end, second in zip(ends, ends[1:], seconds, strict=False)
    )


def result_line(index: int, encoded: str) -> str:
    """Return the line of a result, whose numbers are encoded as base64."""
    return f"{index}:{encoded}\n"


def result_lines(text: str) -> dict[int, str]:
    """Return the results in a job's text, each as base64, by the index of their input.

    The last line counts only if it is complete.
    """
    return dict(_split(text))


def _split(text: str) -> Iterator[tuple[int, str]]:
    for line in text.splitlines(keepends=True):
        index, colon, encoded = line.rstrip("\n").partition(":")
        if colon and line.endswith("\n"):
            yield int(index), encoded


def numbers(encoded: str) -> array[float]:
    """Decode the numbers of a result."""
    values = array("f", base64.b64decode(encoded))
    if sys.byteorder == "big":
        values.byteswap()
    return values


def result_bytes(counts: Iterable[int]) -> int:
    """Return the maximum bytes of the lines of results with these counts of numbers."""
    return sum(LINE_BYTES + (4 * count + 2) // 3 * 4 for count in counts)
