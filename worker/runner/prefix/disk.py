"""Decides what of the prefix cache is written to disk, and under which names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice, takewhile

from worker.runner.kv_segments import Checkpoint, Segment
from worker.runner.prefix.blocks import BLOCK, BlockChain
from worker.runner.prefix.spill import Piece, Spill
from worker.runner.prefix.tree import Node

WRITE_BYTES_PER_S = 500e6
"""Assumed speed of a disk. A checkpoint is written if computing it again takes longer than writing it."""


@dataclass(slots=True)
class Disk:
    """Writes parts of prefixes.

    Attributes:
        spill: the disk store; None: nothing is written.
        token_s: seconds to prefill a token; 0 if unknown.
    """

    spill: Spill | None
    token_s: float = 0.0

    def write(self, node: Node) -> None:
        """Write the blocks up to the end of this node, starting at the first ancestor that is not on disk."""
        if self.spill is None:
            return
        nodes = [node]
        for each in takewhile(lambda above: not self._on_disk(above), islice(node.path(), 1, None)):
            nodes.insert(0, each)
        self._write_blocks(nodes, [each.segment for each in nodes], evicted=False)
        for each in reversed(nodes):  # pending writes are limited, and the last checkpoint saves the most
            if each.checkpoint is not None:
                self.write_checkpoint(each, each.checkpoint, evicted=False)

    def write_evicted(self, run: Sequence[tuple[Node, Segment]]) -> None:
        """Write the blocks that end in these nodes of a path, given from its end.

        The cost depends only on their tokens, not on their depth.
        """
        if run and self.spill is not None:
            nodes, segments = zip(*reversed(run), strict=True)
            self._write_blocks(list(nodes), list(segments), evicted=True)

    def write_checkpoint(self, node: Node, checkpoint: Checkpoint, *, evicted: bool) -> None:
        """Write a checkpoint with the columns since the last complete block, if that is worthwhile."""
        if self.spill is None or node.chain is None or not self._worth_writing(node, checkpoint):
            return
        start, begin, segments = node.chain.start, node.end, list[Segment]()
        for above in node.path():
            if (segments and begin <= start) or above.segment is None:
                break
            segments.insert(0, above.segment)
            begin -= len(above.tokens)
        if begin <= start:
            piece = Piece(node.chain.checkpoint_name, start, node.end, checkpoint)
            self.spill.write([piece], begin, segments, node.used_at, evicted=evicted)

    def _worth_writing(self, node: Node, checkpoint: Checkpoint) -> bool:
        """Return whether computing the state from the previous checkpoint takes longer than writing it.

        Of several checkpoints close to each other, only the first is worthwhile.
        """
        previous = 0
        for above in reversed(list(islice(node.path(), 1, None))):
            stored = above.checkpoint
            on_disk = above.chain and self.spill and self.spill.has(above.chain.checkpoint_name)
            if on_disk or (stored and self._pays(above.end - previous, stored)):
                previous = above.end
        return self._pays(node.end - previous, checkpoint)

    def _pays(self, tokens: int, checkpoint: Checkpoint) -> bool:
        return not self.token_s or tokens * self.token_s > checkpoint.nbytes / WRITE_BYTES_PER_S

    def _on_disk(self, node: Node) -> bool:
        """Return whether the last block that ends in this node is on disk. If it is, so are the blocks before it."""
        known = node.parent.chain.start if node.parent and node.parent.chain else 0
        return bool(node.chain and self.spill and node.chain.start > known and self.spill.has(node.chain.name))

    def _write_blocks(self, nodes: list[Node], segments: list[Segment | None], *, evicted: bool) -> None:
        """Write the blocks that end in these consecutive nodes of a path."""
        parent = nodes[0].parent
        if self.spill is None or parent is None or parent.chain is None:
            return
        tokens = chain.from_iterable(node.tokens for node in nodes)
        pieces = [_block(each) for each in parent.chain.blocks(tuple(tokens))]
        begin = parent.chain.length
        for above in parent.path():  # the first block may begin before the first node
            if not pieces or begin <= pieces[0].start:
                break
            segments.insert(0, above.segment)
            begin -= len(above.tokens)
        complete = [segment for segment in segments if segment is not None]
        if pieces and len(complete) == len(segments) and complete[0].columns:
            self.spill.write(pieces, begin, complete, nodes[-1].used_at, evicted=evicted)


def _block(chain: BlockChain) -> Piece:
    return Piece(chain.name, chain.start - BLOCK, chain.start)
