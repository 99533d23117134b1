"""The stacked matrices of all adapters in memory, for one layer."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True, slots=True)
class TableShape:
    """The size of a table.

    Attributes:
        experts: number of experts, each with a pair of matrices; 1 for other layers.
        rank: the largest rank of the adapters.
    """

    inputs: int
    outputs: int
    rank: int
    experts: int = 1

    def nbytes(self, dtype: mx.Dtype) -> int:
        """Return the bytes that each slot takes."""
        return (self.inputs + self.outputs) * self.rank * self.experts * dtype.size


class Table:
    """The matrices of one layer, by slot: `a` [slots * experts, inputs, rank], `b` [slots * experts, rank, outputs].

    Attributes:
        arrays: `a` and `b`. Replaced by each `write`, so that passes that were queued before keep the previous ones.
    """

    def __init__(self, shape: TableShape, slots: int, dtype: mx.Dtype) -> None:
        self.shape = shape
        self._a = mx.zeros((slots * shape.experts, shape.inputs, shape.rank), dtype)
        self._b = mx.zeros((slots * shape.experts, shape.rank, shape.outputs), dtype)

    @property
    def arrays(self) -> tuple[mx.array, mx.array]:
        """The arrays to evaluate after a `write`."""
        return self._a, self._b

    def write(self, slot: int, a: mx.array | None = None, b: mx.array | None = None) -> None:
        """Put an adapter's matrices into a slot, `b` multiplied with its scale; None: zeros. Computes nothing yet.

        Args:
            a, b: [experts, inputs, rank] and [experts, rank, outputs], with at most the rank of the table.
        """
        start, stop = slot * self.shape.experts, (slot + 1) * self.shape.experts
        self._a[start:stop] = 0
        self._b[start:stop] = 0
        if a is not None and b is not None:
            self._a[start:stop, :, : a.shape[-1]] = a.astype(self._a.dtype)
            self._b[start:stop, : b.shape[-2]] = b.astype(self._b.dtype)

    def product(self, x: mx.array, slots: mx.array) -> mx.array:
        """Return what the adapters add to a linear layer's output.

        Args:
            x: inputs; its first axes are those of the rows, in their order, possibly merged with the tokens' axis.
            slots: [rows].
        """
        by_row = x.reshape(slots.size, -1, x.shape[-1])
        low = mx.gather_mm(by_row, self._a, rhs_indices=slots)
        return mx.gather_mm(low, self._b, rhs_indices=slots).reshape(*x.shape[:-1], -1)

    def transposed_product(self, x: mx.array, slots: mx.array) -> mx.array:
        """Return what the adapters of an embedding add to the logits if the embedding is also the output layer."""
        by_row = x.reshape(slots.size, -1, x.shape[-1])
        low = mx.gather_mm(by_row, self._b.swapaxes(1, 2), rhs_indices=slots)
        return mx.gather_mm(low, self._a.swapaxes(1, 2), rhs_indices=slots).reshape(*x.shape[:-1], -1)

    def lookup(self, ids: mx.array, slots: mx.array) -> mx.array:
        """Return what the adapters add to the embeddings of token ids."""
        by_row = ids.reshape(slots.size, -1)
        low = self._a[slots[:, None], by_row]
        return mx.gather_mm(low, self._b, rhs_indices=slots).reshape(*ids.shape, -1)

    def expert_product(self, x: mx.array, slots: mx.array, experts: mx.array) -> mx.array:
        """Return what the adapters add to the output of experts.

        Args:
            slots, experts: the slot and the expert of each pair of a token and an expert.
        """
        index = slots * self.shape.experts + experts
        low = mx.gather_mm(x, self._a, rhs_indices=index)
        return mx.gather_mm(low, self._b, rhs_indices=index)
