"""The prefix cache: KV segments of earlier prompts and answers, reused by rows that begin with the same tokens.

Each owner has a radix tree, and there is a shared tree. A node stands for consecutive tokens and holds their KV segment
(`worker.runner.kv_segments`), so a prefix of several rows is stored once, and a row that ends adds only its new tokens.
Owners do not see each other's prefixes: the time to the first token reveals whether a prefix was cached, and thus what
another owner has sent. Only prefixes that a row shares explicitly are copied into the shared tree.

A cache belongs to one model in one quantisation. Evicted prefixes, reused prefixes and, on shutdown, all prefixes are
written to disk (`worker.runner.prefix.spill`), where the next worker finds them.

mlx-lm's `LRUPromptCache` stores a complete copy for each row, copies a whole entry to use its prefix, evicts in the
order of arrival, and needs a dictionary for each token.

Copies are queued on the device and executed later. Only the engine thread may call this module.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice, takewhile
from typing import Any

from worker.runner import kv_cache
from worker.runner.kv_cache import KVCache, RowCache
from worker.runner.kv_segments import AttentionSegment, Segment, segment_type
from worker.runner.memory import is_out_of_memory
from worker.runner.prefix.blocks import BLOCK, BlockChain
from worker.runner.prefix.spill import Fetch, Spill

logger = logging.getLogger(__name__)

MIN_TOKENS = 16
"""Minimum length of a prefix. Shorter ones save less time than they cost."""

SHARED = ""
"""The owner of the shared tree. No API key has this id."""


@dataclass(slots=True, eq=False)
class _Node:
    """Consecutive tokens that follow those of the parent node.

    Attributes:
        segment: the KV segment of these tokens; None if only nodes further down have one.
        chain: hash chain up to the end of these tokens, which names blocks on disk; None without a disk store.
    """

    tokens: tuple[int, ...] = ()
    parent: _Node | None = None
    segment: Segment | None = None
    children: dict[int, _Node] = field(default_factory=dict)
    chain: BlockChain | None = None

    def path(self) -> Iterator[_Node]:
        """Iterate from this node up to the child of the root."""
        node = self
        while node.parent is not None:
            yield node
            node = node.parent

    def adopt(self, child: _Node) -> None:
        """Make `child` a child of this node. Replaces the child that begins with the same token."""
        child.parent = self
        self.children[child.tokens[0]] = child
        if self.chain is not None and child.chain is None:
            child.chain = self.chain.after(child.tokens)


class PrefixCache:
    """Prefixes of the rows of one model.

    Args:
        model: an mlx-lm model.
        max_bytes: maximum bytes of all prefixes, including those that are being written to disk; 0: store none.
        spill: the disk store, if there is one.

    Attributes:
        nbytes: bytes of all prefixes in memory.
        version: changes whenever a prefix is added or evicted.
    """

    def __init__(self, model: Any, max_bytes: int, spill: Spill | None = None) -> None:
        self._model = model
        self._segment_type = segment_type(model) if max_bytes > 0 else None
        self._spill = spill if self._segment_type is AttentionSegment else None
        self._max_bytes = self._limit = max_bytes - (self._spill.max_pending_bytes if self._spill else 0)
        self._roots: dict[str, _Node] = {}
        # Nodes with segments, least recently used first. A node always comes before its parent.
        self._used: OrderedDict[_Node, None] = OrderedDict()
        # Nodes that were reused since the last `set_limit`, which writes them to disk: writing them during the reuse
        # would delay the first token of the row.
        self._reused: dict[_Node, None] = {}
        self.nbytes = 0
        self.version = 0
        self._lookups = self._hits = self._reused_tokens = 0

    def length(self, owner: str | None, tokens: Sequence[int]) -> int:
        """Return how many of these tokens, counted from the first, are cached for an owner."""
        return self._find(owner, tokens)[0]

    def load(self, owner: str | None, tokens: Sequence[int]) -> tuple[int, RowCache]:
        """Return the longest cached prefix of these tokens: its length, and a cache for one row that holds it."""
        length, nodes = self._find(owner, tokens)
        self._lookups += 1
        if not nodes or self._segment_type is None:
            return 0, kv_cache.empty_row(self._model)
        self._hits += 1
        self._reused_tokens += length
        self._touch(nodes[-1])
        self._reused[nodes[-1]] = None
        return length, self._segment_type.join([node.segment for node in nodes if node.segment], length)

    def store(self, owner: str | None, tokens: Sequence[int], cache: KVCache, row: int) -> None:
        """Store a row of a batch's cache.

        Args:
            owner: None: store nothing.
            tokens: the tokens that the cache holds of the row.
            row: batch index.
        """
        if owner is None or self._segment_type is None or len(tokens) < MIN_TOKENS or not self._limit:
            return
        copy_from, stop = self._segment_type.copy_from, len(tokens)
        self._insert(owner, tuple(tokens), lambda known: copy_from(cache, row, known, stop))

    def store_partial(self, owner: str | None, tokens: Sequence[int], cache: KVCache, row: int) -> None:
        """Store the first tokens of a row during its prefill. The cache is already allocated for the whole prompt.

        Stores nothing if segments cannot be split, because each would contain the previous one, or if the whole row
        would exceed the limit.
        """
        if self._segment_type is AttentionSegment and cache.nbytes <= self._limit:
            self.store(owner, tokens, cache, row)

    def share(self, owner: str | None, tokens: Sequence[int]) -> None:
        """Copy an owner's prefix to the shared tree, if all of these tokens are cached and segments can be split."""
        length, nodes = self._find_in(owner, tokens) if owner is not None else (0, [])
        if self._segment_type is not AttentionSegment or length < len(tokens):
            return
        if self._find_in(SHARED, tokens)[0] == length:
            return
        segments = [node.segment for node in nodes if isinstance(node.segment, AttentionSegment)]
        cache = KVCache.of_rows([AttentionSegment.join(segments, length)])
        self.store(SHARED, tokens, cache, 0)

    def fetch(self, owner: str | None, tokens: Sequence[int]) -> Fetch | None:
        """Start reading the blocks of these tokens that are on disk but not in memory; None if there are none."""
        if owner is None or self._spill is None or self._segment_type is None:
            return None
        in_memory = self.length(owner, tokens)
        for tree in (owner, SHARED):
            known = self._find_in(tree, tokens)[0]
            if fetch := self._spill.fetch(tree, tuple(tokens), known, in_memory, self._limit):
                return fetch
        return None

    def add_fetched(self, fetch: Fetch) -> bool:
        """Add the next block, which must have been read. Returns whether a further block is useful."""
        start, block = fetch.blocks[0][0], fetch.blocks.popleft()[1].result()
        if block is None or self._segment_type is None:
            return False
        tokens = fetch.tokens[: start + BLOCK]
        known = self._find_in(fetch.owner, tokens)[0]
        if start <= known < len(tokens):
            self._insert(fetch.owner, tokens, lambda known: AttentionSegment.from_tensors(block).after(known - start))
        return bool(fetch.blocks) and self._find_in(fetch.owner, tokens)[0] == len(tokens)

    def set_limit(self, max_bytes: int) -> None:
        """Limit the memory to the minimum of this and the constructor's `max_bytes`, and evict prefixes beyond it."""
        reused, self._reused = self._reused, {}
        for node in reused:
            self._write(node)
        pending_bytes = self._spill.pending_bytes if self._spill else 0
        self._limit = max(0, min(max_bytes - pending_bytes, self._max_bytes))
        self._shrink()

    def close(self, seconds: float) -> None:
        """Write prefixes that are not on disk yet, most recently used first, for at most this long."""
        if self._spill is not None:
            for node in reversed(self._used):
                self._write(node)
            self._spill.close(seconds)

    def clear(self) -> None:
        """Drop all prefixes in memory."""
        self._roots.clear()
        self._used.clear()
        self._reused.clear()
        self.nbytes = 0
        self.version += 1

    def stats(self) -> dict[str, float]:
        """Gauges and counters for `/metrics`."""
        return {
            "prefix_cache_bytes": self.nbytes,
            "prefix_cache_entries": len(self._used),
            "prefix_cache_lookups_total": self._lookups,
            "prefix_cache_hits_total": self._hits,
            "prefix_cache_tokens_total": self._reused_tokens,
            **(self._spill.stats() if self._spill else {}),
        }

    def _insert(self, owner: str, tokens: tuple[int, ...], copy: Callable[[int], Segment]) -> None:
        """Add tokens to a tree; on an error, drop all prefixes and, unless memory ran out, disable the cache.

        Args:
            copy: returns the segment of all tokens but the first `n`, given `n`.
        """
        try:
            self._extend_tree(owner, tokens, copy)
        except Exception as error:
            if not is_out_of_memory(error):
                logger.exception("prefix_cache_off")
                self._segment_type = None
            self.clear()

    def _extend_tree(self, owner: str, tokens: tuple[int, ...], copy: Callable[[int], Segment]) -> None:
        nodes, known = _walk(self._root(owner), tokens)
        if known == len(tokens) and _usable(nodes, known):
            self._touch(nodes[-1])
            return
        node = self._ending_at(nodes, known)
        if known < len(tokens):
            node.adopt(child := _Node(tokens[known:]))
            node = child
        if node.segment is None:
            segment = copy(known)
            if segment.nbytes > self._limit:
                self._prune(node)
                return
            self._attach(node, segment)
        self._touch(node)
        self._shrink()

    def _root(self, owner: str) -> _Node:
        chain = BlockChain.of(owner) if self._spill else None
        return self._roots.setdefault(owner, _Node(chain=chain))

    def _shrink(self) -> None:
        """Evict the least recently used nodes until the limit is met."""
        run: list[tuple[_Node, Segment | None]] = []  # consecutive nodes of a path, from its end towards the root
        while self.nbytes > self._limit:
            node = next(iter(self._used))
            if run and run[-1][0].parent is not node:
                self._write_evicted(run)
                run = []
            run.append((node, self._detach(node)))
            self._prune(node)
        self._write_evicted(run)

    def _write_evicted(self, run: Sequence[tuple[_Node, Segment | None]]) -> None:
        """Write the blocks that end in these nodes. The cost depends only on their tokens, not on their depth."""
        if run and self._spill is not None:
            nodes, segments = zip(*reversed(run), strict=True)
            self._to_disk(list(nodes), list(segments), evicted=True)

    def _write(self, node: _Node) -> None:
        """Write the blocks up to the end of this node, starting at the first ancestor that is not on disk."""
        if self._spill is None:
            return
        nodes = [node]
        for each in takewhile(lambda above: not self._on_disk(above), islice(node.path(), 1, None)):
            nodes.insert(0, each)
        self._to_disk(nodes, [each.segment for each in nodes], evicted=False)

    def _on_disk(self, node: _Node) -> bool:
        """Return whether the last block that ends in this node is on disk. If it is, so are the blocks before it."""
        known = node.parent.chain.start if node.parent and node.parent.chain else 0
        return bool(node.chain and self._spill and node.chain.start > known and self._spill.has(node.chain.name))

    def _to_disk(self, nodes: list[_Node], segments: list[Segment | None], *, evicted: bool) -> None:
        """Write the blocks that end in these consecutive nodes of a path."""
        parent = nodes[0].parent
        if self._spill is None or parent is None or parent.chain is None:
            return
        tokens = chain.from_iterable(node.tokens for node in nodes)
        blocks = [(each.name, each.start - BLOCK) for each in parent.chain.blocks(tuple(tokens))]
        begin = parent.chain.length
        for above in parent.path():  # the first block may begin before the first node
            if not blocks or begin <= blocks[0][1]:
                break
            segments.insert(0, above.segment)
            begin -= len(above.tokens)
        complete = [segment for segment in segments if isinstance(segment, AttentionSegment)]
        if blocks and len(complete) == len(segments):
            self._spill.write(blocks, begin, complete, evicted=evicted)

    def _find(self, owner: str | None, tokens: Sequence[int]) -> tuple[int, list[_Node]]:
        """Return the length of the longest prefix that an owner may use, and the nodes on its path."""
        if owner is None:
            return 0, []
        return max(self._find_in(owner, tokens), self._find_in(SHARED, tokens), key=lambda match: match[0])

    def _find_in(self, owner: str, tokens: Sequence[int]) -> tuple[int, list[_Node]]:
        """Do the same as `_find`, in the tree of one owner only."""
        root = self._roots.get(owner)
        if root is None:
            return 0, []
        nodes, length = _walk(root, tuple(tokens))
        nodes = nodes[1:]
        while nodes and not _usable(nodes, length):
            length = sum(len(node.tokens) for node in nodes[:-1])
            nodes.pop()
        return (length, nodes) if length >= MIN_TOKENS else (0, [])

    def _ending_at(self, nodes: list[_Node], length: int) -> _Node:
        """Return the node of this path that ends after `length` tokens. Splits the last node if it is longer."""
        node = nodes[-1]
        excess = sum(len(each.tokens) for each in nodes) - length
        if not excess:
            return node
        at = len(node.tokens) - excess
        upper, segment = _Node(node.tokens[:at]), self._detach(node)
        nodes[-2].adopt(upper)
        node.tokens = node.tokens[at:]
        upper.adopt(node)
        if segment is not None:
            first, rest = segment.split(at)
            self._attach(node, rest)
            self._attach(upper, first)
        return upper

    def _attach(self, node: _Node, segment: Segment | None) -> None:
        node.segment = segment
        if segment is not None:
            self._used[node] = None
            self.nbytes += segment.nbytes
            self.version += 1

    def _detach(self, node: _Node) -> Segment | None:
        segment, node.segment = node.segment, None
        if segment is not None:
            del self._used[node]
            self.nbytes -= segment.nbytes
            self.version += 1
        return segment

    def _touch(self, node: _Node) -> None:
        """Mark a node as used, and its ancestors too if it needs their segments."""
        needs_ancestors = node.segment is not None and node.segment.splittable
        for each in node.path() if needs_ancestors else (node,):
            self._used.move_to_end(each)

    def _prune(self, node: _Node) -> None:
        """Remove a node without segment and children, then its ancestors for which the same holds."""
        while node.segment is None and not node.children and node.parent is not None:
            del node.parent.children[node.tokens[0]]
            node = node.parent
        if node.parent is None and not node.children:
            self._roots = {owner: root for owner, root in self._roots.items() if root is not node}


def _walk(root: _Node, tokens: tuple[int, ...]) -> tuple[list[_Node], int]:
    """Return the nodes on the path of these tokens, from the root, and the number of matching tokens.

    The last node may match only in part.
    """
    nodes, length = [root], 0
    while length < len(tokens) and (child := nodes[-1].children.get(tokens[length])) is not None:
        shared = common_length(child.tokens, tokens[length : length + len(child.tokens)])
        nodes.append(child)
        length += shared
        if shared < len(child.tokens):
            break
    return nodes, length


def common_length(left: Sequence[int], right: Sequence[int]) -> int:
    """Return the length of the common prefix of two sequences of the same type."""
    low, high = 0, min(len(left), len(right))
    while low < high:  # comparing slices is far faster than comparing token by token
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _usable(nodes: list[_Node], length: int) -> bool:
    """Return whether a row that shares `length` tokens with these nodes can use the last node's segment."""
    segment = nodes[-1].segment
    whole = length == sum(len(node.tokens) for node in nodes)
    return segment is not None and (whole or segment.splittable)
