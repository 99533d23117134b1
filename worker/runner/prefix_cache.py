"""What earlier rows left behind: the cache of their prompts and answers, for rows that begin with the same tokens.

A tree of tokens for each owner, and one that is everybody's. An edge of it is a run of tokens and holds what the
model's cache has of them (`worker.runner.kv_segments`), so what several rows share is kept once, and a row that ends
adds only what is new. Owners never share: whether a prefix was there can be told from the time to the first token, and
would tell one what another has sent. Only what a row gives to everybody, which is copied, serves all.

The cache belongs to one backend, which has one model in one quantisation. What it gives up for want of memory, what was
of use, and at the end all of it, goes to disk (`worker.runner.spill`), where the next backend finds it.

mlx-lm's `LRUPromptCache` keeps a whole copy for each row, of a shared system prompt too, copies all of an entry to
use its beginning, forgets in the order of arrival whatever is in use, and has a dictionary for each token.

Everything here is queued on the device and read by it later; only the engine's thread may call it.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, takewhile
from typing import Any

from worker.runner import kv_cache as kv
from worker.runner.kv_segments import Columns, Piece, kind_for
from worker.runner.memory import is_out_of_memory
from worker.runner.prefix_blocks import BLOCK
from worker.runner.spill import Fetch, Spill

logger = logging.getLogger(__name__)

LEAST_TOKENS = 16
"""Shorter prefixes are neither kept nor used: they save less than they cost."""

EVERYBODY = ""
"""The owner of what all may use. No API key has this id."""


@dataclass(slots=True, eq=False)
class _Node:
    """A run of tokens behind those of its parent.

    Attributes:
        piece: what is kept of them; None at a place where others branch off and nothing was taken.
        owner: of a root: whose tree it is.
    """

    tokens: tuple[int, ...] = ()
    parent: _Node | None = None
    piece: Piece | None = None
    children: dict[int, _Node] = field(default_factory=dict)
    owner: str = ""

    def way(self) -> Iterator[_Node]:
        """From this node to the first below the root."""
        node = self
        while node.parent is not None:
            yield node
            node = node.parent

    def adopt(self, child: _Node) -> None:
        """Make it a child of this node, in the place of the one that begins with the same token."""
        child.parent = self
        self.children[child.tokens[0]] = child


@dataclass(slots=True)
class Totals:
    """What the cache was asked and gave, since the backend was loaded."""

    lookups: int = 0
    hits: int = 0
    tokens: int = 0


class PrefixCache:
    """Prefixes of the rows of one model.

    Args:
        model: an mlx-lm model.
        most_bytes: what all prefixes together may occupy; 0 keeps none.
        spill: the disk beneath it, if there is one. What is on its way there counts as prefixes do.
    """

    def __init__(self, model: Any, most_bytes: int, spill: Spill | None = None) -> None:
        self._model = model
        self._kind = kind_for(model) if most_bytes > 0 else None
        self._spill = spill if self._kind is Columns else None
        self._most_bytes = self._allowed = most_bytes - (self._spill.most_held if self._spill else 0)
        self._roots: dict[str, _Node] = {}
        # Least recently used first. Of a way through the tree the end is always before its beginning.
        self._used: OrderedDict[_Node, None] = OrderedDict()
        # Of use since the last time that rows came or went: written then, when the row that has it is not in a hurry.
        self._proven: dict[_Node, None] = {}
        self.nbytes = 0
        self._totals = Totals()

    def length(self, owner: str | None, tokens: Sequence[int]) -> int:
        """How many of these tokens, from the first, need not be read."""
        return self._find(owner, tokens)[0]

    def load(self, owner: str | None, tokens: Sequence[int]) -> tuple[int, kv.Layers]:
        """The longest prefix of these tokens: its length, and a cache for one row that has it."""
        length, nodes = self._find(owner, tokens)
        self._totals.lookups += 1
        if not nodes or self._kind is None:
            return 0, kv.single(self._model)
        self._totals.hits += 1
        self._totals.tokens += length
        self._touch(nodes[-1])
        self._proven[nodes[-1]] = None
        return length, self._kind.join([node.piece for node in nodes if node.piece], length)

    def store(self, owner: str | None, tokens: Sequence[int], layers: kv.Layers, row: int) -> None:
        """Keep what a row has in a batch's cache, which is exactly these tokens."""
        if owner is None or self._kind is None or len(tokens) < LEAST_TOKENS or not self._allowed:
            return
        of, stop = self._kind.of, len(tokens)
        self._keep(owner, tuple(tokens), lambda known: of(layers, row, known, stop))

    def store_begun(self, owner: str | None, tokens: Sequence[int], layers: kv.Layers, row: int) -> None:
        """The same of a row that is still being read, and whose cache has place for all of it.

        Nothing is kept where pieces cannot be cut, as each would be all there is once more, nor of a row that is too
        long to be kept whole.
        """
        if self._kind is Columns and kv.nbytes(layers) <= self._allowed:
            self.store(owner, tokens, layers, row)

    def share(self, owner: str | None, tokens: Sequence[int]) -> None:
        """Give to everybody what an owner has of these tokens, if that is all of them and they can be cut off there."""
        length, nodes = self._find_in(owner, tokens) if owner is not None else (0, [])
        if self._kind is not Columns or length < len(tokens) or self._find_in(EVERYBODY, tokens)[0] == length:
            return
        pieces = [node.piece for node in nodes if isinstance(node.piece, Columns)]
        layers = kv.merge([Columns.join(pieces, length)])
        self.store(EVERYBODY, tokens, layers, 0)

    def fetch(self, owner: str | None, tokens: Sequence[int]) -> Fetch | None:
        """Begin to read what disk has of these tokens and memory has not; None when there is nothing."""
        if owner is None or self._spill is None or self._kind is None:
            return None
        enough = self.length(owner, tokens)
        for each in (owner, EVERYBODY):
            known = self._find_in(each, tokens)[0]
            if fetch := self._spill.fetch(each, tuple(tokens), known, enough, self._allowed):
                return fetch
        return None

    def place(self, fetch: Fetch) -> bool:
        """Take in the next of the blocks that are being read; False when that was the last that is of use."""
        start, block = fetch.blocks[0][0], fetch.blocks.popleft()[1].result()
        if block is None or self._kind is None:
            return False
        tokens = fetch.tokens[: start + BLOCK]
        known = self._find_in(fetch.owner, tokens)[0]
        if start <= known < len(tokens):
            self._keep(fetch.owner, tokens, lambda known: Columns.from_tensors(block).behind(known - start))
        return bool(fetch.blocks) and self._find_in(fetch.owner, tokens)[0] == len(tokens)

    def allow(self, most_bytes: int) -> None:
        """Occupy no more than that from now on, nor more than it may at all."""
        proven, self._proven = self._proven, {}
        for node in proven:
            self._to_disk(node)
        held = self._spill.held if self._spill else 0
        self._allowed = max(0, min(most_bytes - held, self._most_bytes))
        self._shrink()

    def close(self, seconds: float) -> None:
        """Write what is not on disk yet, what was used last first, as far as that takes no longer."""
        if self._spill is not None:
            for node in reversed(self._used):
                self._to_disk(node)
            self._spill.close(seconds)

    def clear(self) -> None:
        """Forget everything."""
        self._roots.clear()
        self._used.clear()
        self._proven.clear()
        self.nbytes = 0

    def stats(self) -> dict[str, float]:
        """Gauges and counters for `/metrics`."""
        return {
            "prefix_cache_bytes": self.nbytes,
            "prefix_cache_entries": len(self._used),
            "prefix_cache_lookups_total": self._totals.lookups,
            "prefix_cache_hits_total": self._totals.hits,
            "prefix_cache_tokens_total": self._totals.tokens,
            **(self._spill.stats() if self._spill else {}),
        }

    def _keep(self, owner: str, tokens: tuple[int, ...], take: Callable[[int], Piece]) -> None:
        """Grow the tree; `take` gives what there is of these tokens behind so many of them."""
        try:
            self._grow(owner, tokens, take)
        except Exception as error:
            if not is_out_of_memory(error):
                logger.exception("no prefixes are kept from now on: this model's cache cannot be taken apart")
                self._kind = None
            self.clear()

    def _grow(self, owner: str, tokens: tuple[int, ...], take: Callable[[int], Piece]) -> None:
        nodes, known = _walk(self._roots.setdefault(owner, _Node(owner=owner)), tokens)
        if known == len(tokens) and _of_use(nodes, known):
            self._touch(nodes[-1])
            return
        node = self._ending_at(nodes, known)
        if known < len(tokens):
            node.adopt(child := _Node(tokens[known:]))
            node = child
        if node.piece is None:
            piece = take(known)
            if piece.nbytes > self._allowed:
                self._prune(node)
                return
            self._give(node, piece)
        self._touch(node)
        self._shrink()

    def _shrink(self) -> None:
        """Forget what was not used for longest, as far as it is too much."""
        while self.nbytes > self._allowed:
            node = next(iter(self._used))
            self._to_disk(node, given_up=True)
            self._take(node)
            self._prune(node)

    def _to_disk(self, node: _Node, *, given_up: bool = False) -> None:
        """Write what is kept up to the end of this node, unless it is there."""
        if self._spill is None:
            return
        way = [*node.way()][::-1]
        pieces = [each.piece for each in way if isinstance(each.piece, Columns)]
        root = way[0].parent
        if root is not None and len(pieces) == len(way):
            tokens = tuple(chain.from_iterable(each.tokens for each in way))
            self._spill.keep(root.owner, tokens, pieces, given_up=given_up)

    def _find(self, owner: str | None, tokens: Sequence[int]) -> tuple[int, list[_Node]]:
        """The length of the longest prefix that an owner may use, and the nodes it leads through."""
        if owner is None:
            return 0, []
        return max(self._find_in(owner, tokens), self._find_in(EVERYBODY, tokens), key=lambda found: found[0])

    def _find_in(self, owner: str, tokens: Sequence[int]) -> tuple[int, list[_Node]]:
        """The same in one owner's tree."""
        root = self._roots.get(owner)
        if root is None:
            return 0, []
        nodes, length = _walk(root, tuple(tokens))
        nodes = nodes[1:]
        while nodes and not _of_use(nodes, length):
            length = sum(len(node.tokens) for node in nodes[:-1])
            nodes.pop()
        return (length, nodes) if length >= LEAST_TOKENS else (0, [])

    def _ending_at(self, nodes: list[_Node], length: int) -> _Node:
        """The node that ends after so many tokens of this way; the last one is cut in two when it goes on."""
        node = nodes[-1]
        beyond = sum(len(each.tokens) for each in nodes) - length
        if not beyond:
            return node
        at = len(node.tokens) - beyond
        upper, piece = _Node(node.tokens[:at]), self._take(node)
        nodes[-2].adopt(upper)
        node.tokens = node.tokens[at:]
        upper.adopt(node)
        if piece is not None:
            first, rest = piece.cut(at)
            self._give(node, rest)
            self._give(upper, first)
        return upper

    def _give(self, node: _Node, piece: Piece | None) -> None:
        node.piece = piece
        if piece is not None:
            self._used[node] = None
            self.nbytes += piece.nbytes

    def _take(self, node: _Node) -> Piece | None:
        piece, node.piece = node.piece, None
        if piece is not None:
            del self._used[node]
            self.nbytes -= piece.nbytes
        return piece

    def _touch(self, node: _Node) -> None:
        """It was used; and so was all before it, if it is worth nothing without that."""
        cuttable = node.piece is not None and node.piece.cuttable
        for each in node.way() if cuttable else (node,):
            self._used.move_to_end(each)

    def _prune(self, node: _Node) -> None:
        """Drop a node that nothing is kept of, unless it leads to others."""
        while node.piece is None and not node.children and node.parent is not None:
            del node.parent.children[node.tokens[0]]
            node = node.parent
        if node.parent is None and not node.children:
            self._roots = {owner: root for owner, root in self._roots.items() if root is not node}


def _walk(root: _Node, tokens: tuple[int, ...]) -> tuple[list[_Node], int]:
    """The nodes these tokens lead through, from the root, the last perhaps in part; and how many tokens they share."""
    nodes, length = [root], 0
    while length < len(tokens) and (child := nodes[-1].children.get(tokens[length])) is not None:
        shared = common_length(child.tokens, tokens[length : length + len(child.tokens)])
        nodes.append(child)
        length += shared
        if shared < len(child.tokens):
            break
    return nodes, length


def common_length(left: tuple[int, ...], right: tuple[int, ...]) -> int:
    """How many tokens two runs share from the first."""
    if left == right:
        return len(left)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))


def _of_use(nodes: list[_Node], length: int) -> bool:
    """Whether the last of these nodes has something for a row that shares so many tokens with them."""
    piece = nodes[-1].piece
    whole = length == sum(len(node.tokens) for node in nodes)
    return piece is not None and (whole or piece.cuttable)
