"""The prefix cache: parts of the caches of earlier rows, reused by rows that begin with the same tokens.

Each owner has a radix tree, and there is a shared tree (`worker.runner.prefix.tree`). A prefix of several rows is
stored once, and a row that ends adds only its new tokens. Owners do not see each other's prefixes: the time to the
first token reveals whether a prefix was cached, and thus what another owner has sent. Only prefixes that a row shares
explicitly are copied into the shared tree.

Attention layers can be cut at any token, unless the prefix was too long for all columns of sliding windows. Recurrent
layers can be resumed only at a checkpoint, so a row of a model that has some begins at the last checkpoint for which
the segments up to it are cached.

A cache belongs to one model in one quantisation. Long prompts, reused and evicted prefixes and, on shutdown, all
prefixes are written to disk (`worker.runner.prefix.disk`), where the next worker finds them.

mlx-lm's `LRUPromptCache` stores a complete copy for each row, copies a whole entry to use its prefix, evicts in the
order of arrival, and needs a dictionary for each token.

Copies are queued on the device and executed later. Only the engine thread may call this module.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from worker.runner.kv_cache import KVCache
from worker.runner.kv_segments import Checkpoint, Layout, Segment, joined
from worker.runner.memory import is_out_of_memory
from worker.runner.prefix.blocks import ADAPTER, key_of
from worker.runner.prefix.disk import Disk
from worker.runner.prefix.spill import Fetch, Spill
from worker.runner.prefix.tree import Node, PrefixTrees

logger = logging.getLogger(__name__)

MIN_TOKENS = 16
"""Minimum length of a prefix. Shorter ones save less time than they cost."""

SHARED = ""
"""The owner of the shared tree. No API key has this id."""


class PrefixCache:
    """Prefixes of the rows of one model.

    Args:
        model: an mlx-lm model.
        max_bytes: maximum bytes of all prefixes, including those that are being written to disk; 0: store none.
        spill: the disk store, if there is one.

    Attributes:
        layout: what is stored of a row; None: nothing.
        disk: writes prefixes to disk.
    """

    def __init__(self, model: Any, max_bytes: int, spill: Spill | None = None) -> None:
        self._model = model
        self.layout = Layout.of(model) if max_bytes > 0 else None
        self._spill = spill if self.layout else None
        self.disk = Disk(self._spill)
        self._max_bytes = self._limit = max_bytes - (self._spill.max_pending_bytes if self._spill else 0)
        self._trees = PrefixTrees(chained=self._spill is not None)
        # Nodes that the next `set_limit` writes to disk. Writing them at once would delay the first token of a row.
        self._unsaved: dict[Node, None] = {}
        self._purged: set[str] = set()  # API keys for which nothing is stored any more
        self._lookups = self._hits = self._reused_tokens = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all prefixes in memory."""
        return self._trees.nbytes

    @property
    def version(self) -> int:
        """Changes whenever a prefix is added or evicted."""
        return self._trees.version

    @property
    def recurrent(self) -> bool:
        """Whether rows can begin only at checkpoints."""
        return self.layout is not None and bool(self.layout.recurrent)

    def length(self, owner: str | None, tokens: Sequence[int]) -> int:
        """Return how many of these tokens, counted from the first, a row of an owner can take from the cache."""
        return self._find(owner, tokens)[0]

    def matched(self, owner: str | None, tokens: Sequence[int]) -> int:
        """Return how many of these tokens are stored, even if no checkpoint allows a row to take all of them."""
        return 0 if owner is None else max(self._trees.walk(tree, tokens)[1] for tree in (owner, _shared(owner)))

    def load(self, owner: str | None, tokens: Sequence[int]) -> tuple[int, KVCache]:
        """Return the longest cached prefix of these tokens: its length, and a cache for one row that holds it."""
        length, nodes = self._find(owner, tokens)
        self._lookups += 1
        if not nodes or self.layout is None:
            return 0, KVCache.empty(self._model)
        self._hits += 1
        self._reused_tokens += length
        self._trees.touch(nodes[-1])
        self._unsaved[nodes[-1]] = None
        return length, self.layout.row(_segments(nodes), nodes[-1].checkpoint, length)

    def store(
        self,
        owner: str | None,
        tokens: Sequence[int],
        cache: KVCache,
        row: int,
        *,
        checkpoint: bool = True,
        save: bool = False,
    ) -> None:
        """Store a row of a batch's cache.

        Args:
            owner: None: store nothing.
            tokens: the tokens that the cache holds of the row.
            row: batch index.
            checkpoint: store the recurrent state, if the model has one.
            save: also write the row to disk, so that another worker can continue it cheaply.
        """
        if owner is None or self.layout is None or len(tokens) < MIN_TOKENS or not self._limit:
            return
        stop, checkpoint = len(tokens), checkpoint and self.recurrent
        self._insert(
            owner,
            tuple(tokens),
            lambda known: Segment.copy_from(cache, row, known, stop),
            (lambda: Checkpoint.copy_from(cache, row)) if checkpoint else None,
        )
        if save and (nodes := self._trees.walk(owner, tokens)[0]):
            self._unsaved[nodes[-1]] = None

    def store_partial(
        self, owner: str | None, tokens: Sequence[int], cache: KVCache, length: int, *, checkpoint: bool = False
    ) -> None:
        """Store the first tokens of a row during its prefill, unless the whole prompt would exceed the limit.

        Args:
            cache: the row's cache.
            length: number of tokens of the whole prompt.
            checkpoint: see `store`.
        """
        if self.layout is not None and self.layout.thinned_nbytes(length) <= self._limit:
            self.store(owner, tokens, cache, 0, checkpoint=checkpoint)

    def share(self, owner: str | None, tokens: Sequence[int]) -> None:
        """Copy an owner's prefix to the shared tree, if a row could take all of these tokens from the cache."""
        if owner is None:
            return
        length, nodes = self._find_in(owner, tokens)
        shared = _shared(owner)
        if not length or length < len(tokens) or self._find_in(shared, tokens)[0] == length:
            return
        segments, checkpoint = _segments(nodes), nodes[-1].checkpoint
        self._insert(
            shared,
            tuple(tokens),
            lambda known: joined(segments, length).after(known),
            (lambda: Checkpoint(checkpoint.states)) if checkpoint and self.recurrent else None,
        )

    def fetch(self, owner: str | None, tokens: Sequence[int]) -> Fetch | None:
        """Start reading the files of these tokens that are on disk but not in memory; None if there are none."""
        layout = self.layout
        if owner is None or self._spill is None or layout is None:
            return None
        in_memory = self.length(owner, tokens)
        for tree in (owner, _shared(owner)):
            known = self._trees.walk(tree, tokens)[1]
            if fetch := self._spill.fetch(tree, tuple(tokens), known, in_memory, self._limit, layout):
                return fetch
        return None

    def add_fetched(self, fetch: Fetch) -> bool:
        """Add the next file, which must have been read. Returns whether a further file is useful."""
        piece = fetch.pieces.popleft()
        tensors = piece.content.result()
        if tensors is None or self.layout is None:
            return False
        layout, tokens, columns = self.layout, fetch.tokens[: piece.stop], sum(self.layout.attention)
        if piece.start <= self._trees.walk(fetch.owner, tokens)[1]:
            self._insert(
                fetch.owner,
                tokens,
                lambda known: Segment.from_tensors(piece.stop - piece.start, tensors[:columns], layout.attention).after(
                    known - piece.start
                ),
                (lambda: Checkpoint.from_tensors(tensors[columns:], layout.recurrent)) if tensors[columns:] else None,
            )
        return bool(fetch.pieces) and self._trees.walk(fetch.owner, tokens)[1] == len(tokens)

    def set_limit(self, max_bytes: int) -> None:
        """Limit the memory to the minimum of this and the constructor's `max_bytes`, and evict prefixes beyond it."""
        unsaved, self._unsaved = self._unsaved, {}
        for node in unsaved:
            self.disk.write(node)
        pending_bytes = self._spill.pending_bytes if self._spill else 0
        self._limit = max(0, min(max_bytes - pending_bytes, self._max_bytes))
        self._shrink()

    def close(self, seconds: float) -> None:
        """Write prefixes that are not on disk yet, most recently used first, for at most this long."""
        if self._spill is not None:
            for node in self._trees.newest_first():
                if not node.children:  # this writes the nodes above it, too
                    self.disk.write(node)
            self._spill.close(seconds)

    def clear(self) -> None:
        """Drop all prefixes in memory."""
        self._trees.clear()
        self._unsaved.clear()

    def erase(self, cutoffs: Mapping[str, float]) -> None:
        """Drop the prefixes of owners that were not used after a time, by owner, in memory and on disk.

        The time is in seconds since the epoch; infinity: from now on nothing of this owner is stored.
        """
        self._purged |= {owner for owner, cutoff in cutoffs.items() if cutoff == math.inf}
        for owner, cutoff in cutoffs.items():
            self._trees.erase(owner, cutoff)
        self._unsaved = {node: None for node in self._unsaved if node.segment or node.checkpoint}
        if self._spill is not None:
            self._spill.erase(cutoffs)

    def stats(self) -> dict[str, float]:
        """Gauges and counters for `/metrics`."""
        return {
            "prefix_cache_bytes": self.nbytes,
            "prefix_cache_entries": len(self._trees),
            "prefix_cache_lookups_total": self._lookups,
            "prefix_cache_hits_total": self._hits,
            "prefix_cache_tokens_total": self._reused_tokens,
            **(self._spill.stats() if self._spill else {}),
        }

    def _insert(
        self,
        owner: str,
        tokens: tuple[int, ...],
        copy: Callable[[int], Segment],
        checkpoint: Callable[[], Checkpoint] | None,
    ) -> None:
        """Add tokens to a tree; on an error, drop all prefixes and, unless memory ran out, disable the cache.

        Args:
            copy: returns the segment of all tokens but the first `n`, given `n`.
            checkpoint: returns the recurrent state after the last token; None: do not store it.
        """
        if key_of(owner) in self._purged:
            return
        try:
            self._extend_tree(owner, tokens, copy, checkpoint)
        except Exception as error:
            if not is_out_of_memory(error):
                logger.exception("prefix_cache_off")
                self.layout = None
            self.clear()

    def _extend_tree(
        self,
        owner: str,
        tokens: tuple[int, ...],
        copy: Callable[[int], Segment],
        checkpoint: Callable[[], Checkpoint] | None,
    ) -> None:
        nodes, known = self._trees.walk(owner, tokens)
        if known == len(tokens) and (checkpoint is None or (nodes[-1].checkpoint and nodes[-1].end == known)):
            self._trees.touch(nodes[-1])
            return
        parts: list[Segment | Checkpoint] = [copy(known)] if known < len(tokens) else []
        parts += [checkpoint()] if checkpoint is not None else []
        if sum(part.nbytes for part in parts) > self._limit:
            return
        node = self._trees.add(owner, tokens)
        for part in parts:
            self._trees.attach(node, part)
        self._thin(node)
        self._trees.touch(node)
        self._shrink()

    def _thin(self, last: Node) -> None:
        """Drop columns of sliding windows on the path to a node if it would not fit with all of them."""
        layout, branch = self.layout, last.end
        if layout is None or not layout.window or layout.nbytes(last.end) <= self._limit:
            return
        for node in last.path():
            branch = node.end if len(node.children) > 1 else branch
            kept = node.end > branch - layout.window or layout.is_kept(node.end - len(node.tokens), node.end, last.end)
            if node.segment is not None and node.segment.complete and not kept:
                self._trees.replace(node, node.segment.without_windows(layout.windows))

    def _shrink(self) -> None:
        """Evict the least recently used parts until the limit is met."""
        run: list[tuple[Node, Segment]] = []  # consecutive nodes of a path, from its end towards the root
        while self.nbytes > self._limit:
            node, part = self._trees.pop_oldest()
            if isinstance(part, Checkpoint):
                self.disk.write_checkpoint(node, part, evicted=True)
                continue
            if run and run[-1][0].parent is not node:
                self.disk.write_evicted(run)
                run = []
            run.append((node, part))
            self._trees.prune(node)
        self.disk.write_evicted(run)

    def _find(self, owner: str | None, tokens: Sequence[int]) -> tuple[int, list[Node]]:
        """Return the length of the longest prefix that an owner may use, and the nodes on its path."""
        if owner is None:
            return 0, []
        trees = (owner, _shared(owner))
        return max((self._find_in(tree, tokens) for tree in trees), key=lambda match: match[0])

    def _find_in(self, owner: str, tokens: Sequence[int]) -> tuple[int, list[Node]]:
        """Do the same as `_find`, in the tree of one owner only."""
        nodes, length = self._trees.walk(owner, tokens)
        if self.layout is None:
            return 0, []
        if self.recurrent:
            length, nodes = self._last_checkpoint(nodes, length)
        else:
            length = self.layout.usable(_segments(nodes), length)
            nodes = [node for node in nodes if node.end - len(node.tokens) < length]
        return (length, nodes) if length >= MIN_TOKENS else (0, [])

    def _last_checkpoint(self, nodes: list[Node], length: int) -> tuple[int, list[Node]]:
        """Return the longest part of a path that ends with a checkpoint and has all columns that a row needs."""
        layout = self.layout
        for count in range(len(nodes), 0, -1):
            node = nodes[count - 1]
            if layout and node.checkpoint and node.end <= length:
                segments = _segments(nodes[:count])
                if layout.usable(segments, node.end) == node.end:
                    return node.end, nodes[:count]
        return 0, []


def owner_with_adapter(owner: str, adapter: str) -> str:
    """Return the owner of the prefixes of rows with an adapter, which rows with another adapter must not reuse."""
    return f"{owner}{ADAPTER}{adapter}"


def _shared(owner: str) -> str:
    """Return the owner of the shared tree for rows of an owner: there is one for each adapter."""
    _, separator, adapter = owner.partition(ADAPTER)
    return f"{SHARED}{separator}{adapter}"


def _segments(nodes: Sequence[Node]) -> list[Segment]:
    return [node.segment for node in nodes if node.segment is not None]
