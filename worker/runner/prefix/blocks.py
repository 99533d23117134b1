"""The file format of stored prefixes: names, writing and reading of blocks. Does not use MLX.

A block is the KV segment of `BLOCK` tokens. Its name is a hash of the owner and of all tokens up to its end. So every
worker finds a block by its tokens, two workers write the same file for the same tokens, and a name reveals no prompt.
The name begins with the owner's id, so that the files of an API key can be found and erased.

A checkpoint of recurrent layers has a file of its own, named after the last block before it and the tokens since then.
A file is a plain safetensors file with a checksum of its content in the metadata.

The `safetensors` package (0.8.0) is not used. Its readers hold the interpreter lock while they copy from disk, so the
engine thread would wait for the disk (64 MB from the page cache: 50 to 130 ms, with `numpy.fromfile` 1 to 11 ms), and
its numpy reader does not support bfloat16. MLX reads lazily, and only the engine thread may evaluate arrays.
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

from shared.jobs.request import SHARED_PREFIXES

BLOCK = 128
"""Tokens per block. Files have a few megabytes, and the incomplete rest of a prefix, which is not stored, is short."""

_SEPARATOR = "_"
ADAPTER = "+"
"""Separates the id of an API key from the adapter in the name of an owner. No id contains it."""

_HEADER_BYTES = 8
_MAX_HEADER_BYTES = 2**24
_NO_DIGEST = hashlib.sha256().hexdigest()


class BrokenBlock(Exception):
    """The content of a file is not what was written under its name."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """An array in host memory: its safetensors type, shape, and bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray[Any, np.dtype[np.uint8]]


Block: TypeAlias = list[Tensor]


@dataclass(frozen=True, slots=True)
class BlockChain:
    """The running hash of a sequence of tokens. It yields the names of the blocks that follow.

    Each node of the prefix tree stores one, so naming its blocks costs only hashing its own tokens.

    Attributes:
        owner: see `key_of`.
        hashed: hash of the owner and of all complete blocks so far.
        start: number of tokens in these blocks.
        rest: the tokens after these blocks, fewer than a block.
    """

    owner: str
    hashed: Any
    start: int = 0
    rest: tuple[int, ...] = ()

    @classmethod
    def of(cls, owner: str) -> Self:
        """Return the chain before the first token of an owner's sequence."""
        return cls(key_of(owner), hashlib.sha256(owner.encode() + b"\0"))

    @property
    def length(self) -> int:
        """Total number of tokens."""
        return self.start + len(self.rest)

    @property
    def name(self) -> str:
        """Name of the last complete block; names no block if there is none."""
        return f"{self.owner}{_SEPARATOR}{self.hashed.hexdigest()}"

    @property
    def checkpoint_name(self) -> str:
        """Name of a checkpoint after the last token."""
        return f"{self.name}-{len(self.rest)}-{hashlib.sha256(array('I', self.rest)).hexdigest()[:32]}"

    def blocks(self, tokens: Sequence[int]) -> Iterator[BlockChain]:
        """Yield the chain at the end of each complete block that ends within the following tokens."""
        chain, unhashed = self, (*self.rest, *tokens)
        for index in range(0, len(unhashed) - BLOCK + 1, BLOCK):
            hashed = chain.hashed.copy()
            hashed.update(array("I", unhashed[index : index + BLOCK]))
            chain = BlockChain(self.owner, hashed, self.start + index + BLOCK)
            yield chain

    def chain_of(self, tokens: Sequence[int]) -> Iterator[BlockChain]:
        """Yield this chain, and that at the end of each complete block of the following tokens."""
        yield self
        yield from self.blocks(tokens)

    def after(self, tokens: Sequence[int]) -> BlockChain:
        """Return the chain at the end of the following tokens."""
        *_, last = (self, *self.blocks(tokens))
        return BlockChain(self.owner, last.hashed, last.start, (*self.rest, *tokens)[last.start - self.start :])


def key_of(owner: str) -> str:
    """Return the id of an owner's API key, without the adapter; `SHARED_PREFIXES` for prefixes of all keys."""
    return owner.partition(ADAPTER)[0] or SHARED_PREFIXES


def owner_of(name: str) -> str:
    """Return the owner of a block or checkpoint, by its name; empty for a file of an earlier version."""
    owner, separator, _ = name.partition(_SEPARATOR)
    return owner if separator else ""


def is_checkpoint(name: str) -> bool:
    """Return whether a file is a checkpoint rather than a block."""
    return name.count("-") == 2


def split_name(checkpoint: str) -> tuple[str, int]:
    """Return the name of the last block before a checkpoint, and the number of tokens since then."""
    block, length, _ = checkpoint.split("-")
    return block, int(length)


def write(path: Path, name: str, block: Block) -> None:
    """Write a block. Rename the file to its final name only after this has returned."""
    header = _header(name, block)
    path.touch(mode=0o600)
    with path.open("r+b") as file:
        file.write(len(header).to_bytes(_HEADER_BYTES, "little") + header)
        for tensor in block:
            file.write(tensor.data.data)


def size(name: str, block: Block) -> int:
    """Return the size of a block's file in bytes."""
    return _HEADER_BYTES + len(_header(name, block, _NO_DIGEST)) + sum(each.data.size for each in block)


def read(path: Path, name: str) -> Block:
    """Read a block.

    Raises:
        BrokenBlock: the file is truncated or changed, or holds another block.
        OSError: the file is missing or cannot be read.
    """
    content = np.fromfile(path, dtype=np.uint8)
    length = int.from_bytes(content[:_HEADER_BYTES].tobytes(), "little")
    if not 0 < length <= min(_MAX_HEADER_BYTES, content.size):
        raise BrokenBlock(path.name)
    header, body = content[_HEADER_BYTES : _HEADER_BYTES + length].tobytes(), content[_HEADER_BYTES + length :]
    try:
        block = _parsed(json.loads(header), body)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BrokenBlock(path.name) from error
    complete = body.size == sum(tensor.data.size for tensor in block)
    if not complete or header != _header(name, block):  # the header contains the checksum
        raise BrokenBlock(path.name)
    return block


def _parsed(header: dict[str, Any], body: np.ndarray[Any, np.dtype[np.uint8]]) -> Block:
    tensors = (header[str(index)] for index in range(len(header) - 1))
    return [Tensor(each["dtype"], tuple(each["shape"]), body[slice(*each["data_offsets"])]) for each in tensors]


def _header(name: str, block: Block, digest: str | None = None) -> bytes:
    described: dict[str, Any] = {}
    end = 0
    for index, tensor in enumerate(block):
        start, end = end, end + tensor.data.size
        described[str(index)] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end]}
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
