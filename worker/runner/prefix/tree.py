"""Radix trees of token sequences, one per owner, with stored parts of caches and the order in which these are evicted.

A node stands for consecutive tokens. It holds their KV segment, and in a model with recurrent layers perhaps a
checkpoint of the state after the last of them. All nodes up to one with a segment have segments.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from worker.runner.kv_segments import Checkpoint, Segment
from worker.runner.prefix.blocks import BlockChain, key_of


@dataclass(slots=True, eq=False)
class Node:
    """Consecutive tokens that follow those of the parent node.

    Attributes:
        end: number of tokens from the root to the end of these.
        segment: the KV segment of these tokens; None while it is not stored.
        checkpoint: the recurrent state after these tokens, if it is stored.
        chain: hash chain up to the end of these tokens, which names files on disk; None without a disk store.
        used_at: when a row last used these tokens, in seconds since the epoch.
    """

    tokens: tuple[int, ...] = ()
    parent: Node | None = None
    end: int = 0
    segment: Segment | None = None
    checkpoint: Checkpoint | None = None
    children: dict[int, Node] = field(default_factory=dict)
    chain: BlockChain | None = None
    used_at: float = 0.0

    def path(self) -> Iterator[Node]:
        """Iterate from this node up to the child of the root."""
        node = self
        while node.parent is not None:
            yield node
            node = node.parent

    def adopt(self, child: Node) -> None:
        """Make `child` a child of this node. Replaces the child that begins with the same token."""
        child.parent, child.end = self, self.end + len(child.tokens)
        self.children[child.tokens[0]] = child
        if self.chain is not None and child.chain is None:
            child.chain = self.chain.after(child.tokens)


class PrefixTrees:
    """The trees of all owners.

    Args:
        chained: whether nodes have hash chains.

    Attributes:
        nbytes: bytes of all segments and checkpoints.
        version: changes whenever a segment or a checkpoint is added or removed.
    """

    def __init__(self, *, chained: bool) -> None:
        self.nbytes = 0
        self.version = 0
        self._chained = chained
        self._roots: dict[str, Node] = {}
        # Least recently used first. A segment comes before that of its parent node, and after its node's checkpoint.
        self._used: OrderedDict[Segment | Checkpoint, Node] = OrderedDict()

    def __len__(self) -> int:
        return len(self._used)

    def walk(self, owner: str, tokens: Sequence[int]) -> tuple[list[Node], int]:
        """Return the nodes with segments on the path of these tokens, and the number of tokens that match.

        The last node may match only in part.
        """
        root = self._roots.get(owner)
        nodes, length = _walk(root, tuple(tokens)) if root else ([], 0)
        stored = [node for node in nodes[1:] if node.segment is not None]
        return stored, min(length, stored[-1].end) if stored else 0

    def add(self, owner: str, tokens: tuple[int, ...]) -> Node:
        """Return the node that ends after these tokens. Adds it if it is missing."""
        nodes, known = _walk(self._root(owner), tokens)
        node = self._ending_at(nodes, known)
        if known < len(tokens):
            node.adopt(child := Node(tokens[known:]))
            node = child
        return node

    def attach(self, node: Node, part: Segment | Checkpoint) -> None:
        """Store a part in a node that has none of this kind."""
        if isinstance(part, Segment):
            node.segment = part
        else:
            node.checkpoint = part
        self._used[part] = node
        self.nbytes += part.nbytes
        self.version += 1

    def replace(self, node: Node, segment: Segment) -> None:
        """Replace the segment of a node. Call `touch` afterwards for a node below it."""
        if node.segment is not None:
            self._detach(node, node.segment)
        self.attach(node, segment)

    def touch(self, node: Node) -> None:
        """Mark the checkpoint of a node, its segment and those of its ancestors as used."""
        now = time.time()
        for part in (node.checkpoint, *(each.segment for each in node.path())):
            if part is not None:
                self._used.move_to_end(part)
        for each in node.path():
            each.used_at = now

    def erase(self, owner: str, cutoff: float) -> None:
        """Remove the parts of an API key that were not used after a time, in seconds since the epoch.

        Args:
            owner: see `worker.runner.prefix.blocks.key_of`.
        """
        roots = [root for name, root in self._roots.items() if key_of(name) == owner]
        for node in reversed([node for root in roots for node in _below(root)]):
            if node.used_at <= cutoff:
                for part in (node.checkpoint, node.segment):
                    if part is not None:
                        self._detach(node, part)
                self.prune(node)

    def pop_oldest(self) -> tuple[Node, Segment | Checkpoint]:
        """Remove the least recently used part. Returns it and its node, which `prune` may remove."""
        part, node = next(iter(self._used.items()))
        self._detach(node, part)
        return node, part

    def prune(self, node: Node) -> None:
        """Remove a node without parts and children, then its ancestors for which the same holds."""
        while not (node.segment or node.checkpoint or node.children) and node.parent is not None:
            del node.parent.children[node.tokens[0]]
            node = node.parent
        if node.parent is None and not node.children:
            self._roots = {owner: root for owner, root in self._roots.items() if root is not node}

    def newest_first(self) -> list[Node]:
        """Return all nodes with parts, most recently used first."""
        return list(dict.fromkeys(reversed(self._used.values())))

    def clear(self) -> None:
        """Remove everything."""
        self._roots.clear()
        self._used.clear()
        self.nbytes = 0
        self.version += 1

    def _root(self, owner: str) -> Node:
        if owner not in self._roots:
            self._roots[owner] = Node(chain=BlockChain.of(owner) if self._chained else None)
        return self._roots[owner]

    def _detach(self, node: Node, part: Segment | Checkpoint) -> None:
        if isinstance(part, Segment):
            node.segment = None
        else:
            node.checkpoint = None
        del self._used[part]
        self.nbytes -= part.nbytes
        self.version += 1

    def _ending_at(self, nodes: list[Node], length: int) -> Node:
        """Return the node of this path that ends after `length` tokens. Splits the last node if it is longer."""
        node = nodes[-1]
        if node.end == length:
            return node
        at = length - (node.end - len(node.tokens))
        upper = Node(node.tokens[:at], used_at=node.used_at)
        parts = [part for part in (node.checkpoint, node.segment) if part]
        for part in parts:
            self._detach(node, part)
        nodes[-2].adopt(upper)
        node.tokens = node.tokens[at:]
        upper.adopt(node)
        for part in parts:
            if isinstance(part, Segment):
                first, rest = part.split(at)
                self.attach(node, rest)
                self.attach(upper, first)
            else:
                self.attach(node, part)
        return upper


def _below(root: Node) -> Iterator[Node]:
    """Yield all nodes below a root, each before those below it."""
    found = [*root.children.values()]
    while found:
        node = found.pop()
        yield node
        found += node.children.values()


def _walk(root: Node, tokens: tuple[int, ...]) -> tuple[list[Node], int]:
    """Return the nodes on the path of these tokens, from the root, and the number of matching tokens."""
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
