"""Blocks of prefixes as files: how they are named, written and read. Nothing here knows MLX.

A block is what a model's cache has of `BLOCK` tokens. Its name is a hash of the owner and of every token up to its
end, so a worker with the same tokens asks for the same name, two workers write the same file, and no name reveals a
prompt. A file is a plain safetensors file with a checksum over all that it says.

The `safetensors` package (0.8.0) does not read or write them. Its readers hold the interpreter lock while they copy
from disk, so the engine's thread waits as long as the disk takes (64 MB from the page cache: 50 to 130 ms, with
`numpy.fromfile` 1 to 11 ms), and its numpy reader has no bfloat16. MLX's reader is lazy, and only the engine's thread
may evaluate arrays.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np

BLOCK = 128
"""Tokens of a block: files of some megabytes, and little of a prefix lies behind the last whole one."""

_HEADER_BYTES = 8
_MOST_HEADER = 2**24
_NO_DIGEST = hashlib.sha256().hexdigest()


class BrokenBlock(Exception):
    """A file is not what was written under its name."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """An array on the host: its safetensors type, shape, and bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray[Any, np.dtype[np.uint8]]


Block: TypeAlias = list[Tensor]


@dataclass(frozen=True, slots=True)
class BlockChain:
    """The running hash of a sequence of tokens, from which the names of the blocks that follow are computed.

    A node of the prefix tree keeps one, so naming its blocks costs no more than hashing its own tokens.

    Attributes:
        hashed: hash of the owner and of all whole blocks so far.
        start: tokens in those blocks.
        rest: tokens behind them, fewer than a block.
    """

    hashed: Any
    start: int = 0
    rest: tuple[int, ...] = ()

    @classmethod
    def of(cls, owner: str) -> Self:
        """Before the first token of an owner's sequence."""
        return cls(hashlib.sha256(owner.encode() + b"\0"))

    @property
    def length(self) -> int:
        """Tokens in all."""
        return self.start + len(self.rest)

    @property
    def name(self) -> str:
        """Of the last whole block; of no block where there is none."""
        return str(self.hashed.hexdigest())

    def blocks(self, tokens: Sequence[int]) -> Iterator[BlockChain]:
        """The chain up to the end of each whole block that ends in these tokens, which follow; lazily."""
        chain, unhashed = self, (*self.rest, *tokens)
        for at in range(0, len(unhashed) - BLOCK + 1, BLOCK):
            hashed = chain.hashed.copy()
            hashed.update(array("I", unhashed[at : at + BLOCK]))
            chain = BlockChain(hashed, self.start + at + BLOCK)
            yield chain

    def after(self, tokens: Sequence[int]) -> BlockChain:
        """The chain up to the end of these tokens, which follow."""
        *_, last = (self, *self.blocks(tokens))
        return BlockChain(last.hashed, last.start, (*self.rest, *tokens)[last.start - self.start :])


def names(owner: str, tokens: Sequence[int]) -> Iterator[str]:
    """Of each whole block of these tokens, from the first."""
    return (chain.name for chain in BlockChain.of(owner).blocks(tokens))


def write(path: Path, name: str, block: Block) -> None:
    """Write a block. The file may only be known by its name once this has returned."""
    header = _header(name, block)
    path.touch(mode=0o600)
    with path.open("r+b") as file:
        file.write(len(header).to_bytes(_HEADER_BYTES, "little") + header)
        for tensor in block:
            file.write(tensor.data.data)


def size(name: str, block: Block) -> int:
    """Bytes of its file."""
    return _HEADER_BYTES + len(_header(name, block, _NO_DIGEST)) + sum(each.data.size for each in block)


def read(path: Path, name: str) -> Block:
    """Read a block.

    Raises:
        BrokenBlock: it is cut, changed, or another one's.
        OSError: it is not there, or cannot be read.
    """
    content = np.fromfile(path, dtype=np.uint8)
    length = int.from_bytes(content[:_HEADER_BYTES].tobytes(), "little")
    if not 0 < length <= min(_MOST_HEADER, content.size):
        raise BrokenBlock(path.name)
    header, body = content[_HEADER_BYTES : _HEADER_BYTES + length].tobytes(), content[_HEADER_BYTES + length :]
    try:
        block = _parsed(json.loads(header), body)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BrokenBlock(path.name) from error
    whole = body.size == sum(tensor.data.size for tensor in block)
    if not whole or header != _header(name, block):  # the checksum is in it
        raise BrokenBlock(path.name)
    return block


def _parsed(header: dict[str, Any], body: np.ndarray[Any, np.dtype[np.uint8]]) -> Block:
    tensors = (header[str(place)] for place in range(len(header) - 1))
    return [Tensor(each["dtype"], tuple(each["shape"]), body[slice(*each["data_offsets"])]) for each in tensors]


def _header(name: str, block: Block, digest: str | None = None) -> bytes:
    described: dict[str, Any] = {}
    end = 0
    for place, tensor in enumerate(block):
        start, end = end, end + tensor.data.size
        described[str(place)] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end]}
    if digest is None:
        digest = _digest(name, described, block)
    described["__metadata__"] = {"block": name, "digest": digest}
    header = json.dumps(described).encode()
    return header + b" " * (-len(header) % _HEADER_BYTES)


def _digest(name: str, described: dict[str, Any], block: Block) -> str:
    running = hashlib.sha256(json.dumps([name, described]).encode())
    for tensor in block:
        running.update(tensor.data.data)
    return running.hexdigest()
