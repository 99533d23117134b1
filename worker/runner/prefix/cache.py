"""The prefix cache: the KV cache of earlier rows' prompts and answers, for rows that begin with the same tokens.

There is a radix tree for each owner, and a shared one. A node is a run of tokens and holds the model's cache of them
(`worker.runner.kv_segments`), so a prefix of several rows is kept once, and a row that ends adds only what is new.
Owners do not share: the time to the first token reveals whether a prefix was cached, and with it what another owner has
sent. Only what a row shares explicitly is copied into the shared tree.

The cache belongs to one model in one quantisation. What is evicted, what was reused, and at the end everything, is
written to disk (`worker.runner.prefix.spill`), where the next worker finds it.

mlx-lm's `LRUPromptCache` keeps a whole copy for each row, copies all of an entry to use its prefix, evicts in the order
of arrival, and has a dictionary for each token.

Copies are queued on the device and made by it later; only the engine's thread may call this.
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
from worker.runner.kv_segments import AttentionSegment, Segment, kind_for
from worker.runner.memory import is_out_of_memory
from worker.runner.prefix.blocks import BLOCK, BlockChain
from worker.runner.prefix.spill import Fetch, Spill

logger = logging.getLogger(__name__)

LEAST_TOKENS = 16
"""Minimum length of a prefix: shorter ones save less than they cost."""

SHARED = ""
"""Owner of the shared tree. No API key has this id."""


@dataclass(slots=True, eq=False)
class _Node:
    """A run of tokens behind those of its parent.

    Attributes:
        segment: what is kept of them; None where others branch off and nothing was taken.
        chain: names the blocks that end behind these tokens; None without a disk.
    """

    tokens: tuple[int, ...] = ()
    parent: _Node | None = None
    segment: Segment | None = None
    children: dict[int, _Node] = field(default_factory=dict)
    chain: BlockChain | None = None

    def path(self) -> Iterator[_Node]:
        """From this node up to the one below the root."""
        node = self
        while node.parent is not None:
            yield node
            node = node.parent

    def adopt(self, child: _Node) -> None:
        """Make it a child of this node, in the place of the one that begins with the same token."""
        child.parent = self
        self.children[child.tokens[0]] = child
        if self.chain is not None and child.chain is None:
            child.chain = self.chain.after(child.tokens)


class PrefixCache:
    """Prefixes of the rows of one model.

    Args:
        model: an mlx-lm model.
        most_bytes: what all prefixes together may occupy; 0 keeps none.
        spill: the disk beneath it, if there is one. What is on its way there counts as prefixes do.

    Attributes:
        nbytes: bytes of all prefixes.
        version: changes whenever a prefix was added or evicted.
    """

    def __init__(self, model: Any, most_bytes: int, spill: Spill | None = None) -> None:
        self._model = model
        self._kind = kind_for(model) if most_bytes > 0 else None
        self._spill = spill if self._kind is AttentionSegment else None
        self._most_bytes = self._allowed = most_bytes - (self._spill.most_held if self._spill else 0)
        self._roots: dict[str, _Node] = {}
        # Least recently used first. A node always comes before its parent.
        self._used: OrderedDict[_Node, None] = OrderedDict()
        # Reused since `allow` was called last, which writes them: not while the row waits for its first token.
        self._reused: dict[_Node, None] = {}
        self.nbytes = 0
        self.version = 0
        self._lookups = self._hits = self._reused_tokens = 0

    def length(self, owner: str | None, tokens: Sequence[int]) -> int:
        """How many of these tokens, from the first, are cached."""
        return self._find(owner, tokens)[0]

    def load(self, owner: str | None, tokens: Sequence[int]) -> tuple[int, RowCache]:
        """The longest prefix of these tokens: its length, and a cache for one row that has it."""
        length, nodes = self._find(owner, tokens)
        self._lookups += 1
        if not nodes or self._kind is None:
            return 0, kv_cache.empty_row(self._model)
        self._hits += 1
        self._reused_tokens += length
        self._touch(nodes[-1])
        self._reused[nodes[-1]] = None
        return length, self._kind.join([node.segment for node in nodes if node.segment], length)

    def store(self, owner: str | None, tokens: Sequence[int], cache: KVCache, row: int) -> None:
        """Keep what a batch's cache has of a row, which is exactly these tokens."""
        if owner is None or self._kind is None or len(tokens) < LEAST_TOKENS or not self._allowed:
            return
        of, stop = self._kind.of, len(tokens)
        self._keep(owner, tuple(tokens), lambda known: of(cache, row, known, stop))

    def store_partial(self, owner: str | None, tokens: Sequence[int], cache: KVCache, row: int) -> None:
        """The same of a row that is still being prefilled, and whose cache has room for all of it.

        Nothing is kept where segments cannot be cut, as each would be all there is once more, nor of a row that is too
        long to be kept whole.
        """
        if self._kind is AttentionSegment and cache.nbytes <= self._allowed:
            self.store(owner, tokens, cache, row)

    def share(self, owner: str | None, tokens: Sequence[int]) -> None:
        """Copy an owner's prefix to the shared tree, if all of these tokens are cached and can be cut off there."""
        length, nodes = self._find_in(owner, tokens) if owner is not None else (0, [])
        if self._kind is not AttentionSegment or length < len(tokens):
            return
        if self._find_in(SHARED, tokens)[0] == length:
            return
        segments = [node.segment for node in nodes if isinstance(node.segment, AttentionSegment)]
        cache = KVCache.of_rows([AttentionSegment.join(segments, length)])
        self.store(SHARED, tokens, cache, 0)

    def fetch(self, owner: str | None, tokens: Sequence[int]) -> Fetch | None:
        """Start reading the blocks of these tokens that are on disk and not in memory; None when there are none."""
        if owner is None or self._spill is None or self._kind is None:
            return None
        enough = self.length(owner, tokens)
        for each in (owner, SHARED):
            known = self._find_in(each, tokens)[0]
            if fetch := self._spill.fetch(each, tuple(tokens), known, enough, self._allowed):
                return fetch
        return None

    def place(self, fetch: Fetch) -> bool:
        """Add the next block that was read; False when no further one is of use."""
        start, block = fetch.blocks[0][0], fetch.blocks.popleft()[1].result()
        if block is None or self._kind is None:
            return False
        tokens = fetch.tokens[: start + BLOCK]
        known = self._find_in(fetch.owner, tokens)[0]
        if start <= known < len(tokens):
            self._keep(fetch.owner, tokens, lambda known: AttentionSegment.from_tensors(block).behind(known - start))
        return bool(fetch.blocks) and self._find_in(fetch.owner, tokens)[0] == len(tokens)

    def allow(self, most_bytes: int) -> None:
        """Limit the memory to the lesser of this and the constructor's `most_bytes`; evict what exceeds it."""
        reused, self._reused = self._reused, {}
        for node in reused:
            self._write(node)
        held = self._spill.held if self._spill else 0
        self._allowed = max(0, min(most_bytes - held, self._most_bytes))
        self._shrink()

    def close(self, seconds: float) -> None:
        """Write what is not on disk yet, most recently used first, for at most this long."""
        if self._spill is not None:
            for node in reversed(self._used):
                self._write(node)
            self._spill.close(seconds)

    def clear(self) -> None:
        """Drop everything."""
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

    def _keep(self, owner: str, tokens: tuple[int, ...], take: Callable[[int], Segment]) -> None:
        """Add tokens to the tree; `take(known)` returns the segment of those after the first `known`."""
        try:
            self._grow(owner, tokens, take)
        except Exception as error:
            if not is_out_of_memory(error):
                logger.exception("prefix_cache_off")
                self._kind = None
            self.clear()

    def _grow(self, owner: str, tokens: tuple[int, ...], take: Callable[[int], Segment]) -> None:
        nodes, known = _walk(self._root(owner), tokens)
        if known == len(tokens) and _usable(nodes, known):
            self._touch(nodes[-1])
            return
        node = self._ending_at(nodes, known)
        if known < len(tokens):
            node.adopt(child := _Node(tokens[known:]))
            node = child
        if node.segment is None:
            segment = take(known)
            if segment.nbytes > self._allowed:
                self._prune(node)
                return
            self._give(node, segment)
        self._touch(node)
        self._shrink()

    def _root(self, owner: str) -> _Node:
        chain = BlockChain.of(owner) if self._spill else None
        return self._roots.setdefault(owner, _Node(chain=chain))

    def _shrink(self) -> None:
        """Evict the least recently used nodes until the limit is kept."""
        run: list[tuple[_Node, Segment | None]] = []  # of one path, from its end towards the root
        while self.nbytes > self._allowed:
            node = next(iter(self._used))
            if run and run[-1][0].parent is not node:
                self._write_evicted(run)
                run = []
            run.append((node, self._take(node)))
            self._prune(node)
        self._write_evicted(run)

    def _write_evicted(self, run: Sequence[tuple[_Node, Segment | None]]) -> None:
        """Write the blocks that end in these nodes. The cost depends on their tokens alone, not on their depth."""
        if run and self._spill is not None:
            nodes, segments = zip(*reversed(run), strict=True)
            self._to_disk(list(nodes), list(segments), evicted=True)

    def _write(self, node: _Node) -> None:
        """Write the blocks up to the end of this node, from the first ancestor on that is not on disk."""
        if self._spill is None:
            return
        nodes = [node]
        for each in takewhile(lambda above: not self._on_disk(above), islice(node.path(), 1, None)):
            nodes.insert(0, each)
        self._to_disk(nodes, [each.segment for each in nodes], evicted=False)

    def _on_disk(self, node: _Node) -> bool:
        """Whether the last block that ends in this node is on disk; those before it are then, too."""
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
        known = [segment for segment in segments if isinstance(segment, AttentionSegment)]
        if blocks and len(known) == len(segments):
            self._spill.keep(blocks, begin, known, evicted=evicted)

    def _find(self, owner: str | None, tokens: Sequence[int]) -> tuple[int, list[_Node]]:
        """The length of the longest prefix that an owner may use, and the nodes it leads through."""
        if owner is None:
            return 0, []
        return max(self._find_in(owner, tokens), self._find_in(SHARED, tokens), key=lambda found: found[0])

    def _find_in(self, owner: str, tokens: Sequence[int]) -> tuple[int, list[_Node]]:
        """The same in one owner's tree."""
        root = self._roots.get(owner)
        if root is None:
            return 0, []
        nodes, length = _walk(root, tuple(tokens))
        nodes = nodes[1:]
        while nodes and not _usable(nodes, length):
            length = sum(len(node.tokens) for node in nodes[:-1])
            nodes.pop()
        return (length, nodes) if length >= LEAST_TOKENS else (0, [])

    def _ending_at(self, nodes: list[_Node], length: int) -> _Node:
        """The node on this path that ends after `length` tokens; the last node is split if it is longer."""
        node = nodes[-1]
        beyond = sum(len(each.tokens) for each in nodes) - length
        if not beyond:
            return node
        at = len(node.tokens) - beyond
        upper, segment = _Node(node.tokens[:at]), self._take(node)
        nodes[-2].adopt(upper)
        node.tokens = node.tokens[at:]
        upper.adopt(node)
        if segment is not None:
            first, rest = segment.cut(at)
            self._give(node, rest)
            self._give(upper, first)
        return upper

    def _give(self, node: _Node, segment: Segment | None) -> None:
        node.segment = segment
        if segment is not None:
            self._used[node] = None
            self.nbytes += segment.nbytes
            self.version += 1

    def _take(self, node: _Node) -> Segment | None:
        segment, node.segment = node.segment, None
        if segment is not None:
            del self._used[node]
            self.nbytes -= segment.nbytes
            self.version += 1
        return segment

    def _touch(self, node: _Node) -> None:
        """Mark it as used, and its ancestors as well where it needs their segments."""
        cuttable = node.segment is not None and node.segment.cuttable
        for each in node.path() if cuttable else (node,):
            self._used.move_to_end(each)

    def _prune(self, node: _Node) -> None:
        """Remove a node without segment and children, and then its ancestors likewise."""
        while node.segment is None and not node.children and node.parent is not None:
            del node.parent.children[node.tokens[0]]
            node = node.parent
        if node.parent is None and not node.children:
            self._roots = {owner: root for owner, root in self._roots.items() if root is not node}


def _walk(root: _Node, tokens: tuple[int, ...]) -> tuple[list[_Node], int]:
    """The nodes on the path of these tokens, the root first and the last perhaps in part; and the tokens they share."""
    nodes, length = [root], 0
    while length < len(tokens) and (child := nodes[-1].children.get(tokens[length])) is not None:
        shared = common_length(child.tokens, tokens[length : length + len(child.tokens)])
        nodes.append(child)
        length += shared
        if shared < len(child.tokens):
            break
    return nodes, length


def common_length(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the common prefix of two sequences of the same type."""
    low, high = 0, min(len(left), len(right))
    while low < high:  # compares slices: far faster than one token after the other
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _usable(nodes: list[_Node], length: int) -> bool:
    """Whether a row that shares `length` tokens with these nodes can use the last one's segment."""
    segment = nodes[-1].segment
    whole = length == sum(len(node.tokens) for node in nodes)
    return segment is not None and (whole or segment.cuttable)
