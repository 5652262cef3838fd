"""The product of rows with an lm_head and its two gradients, exact whatever the types.

Float32 and float64 are multiplied as they are. A GPU multiplies narrow types and accumulates into float32. A CPU has no
such product: narrow weights are widened a block of the vocabulary at a time, so that no wide copy of them ever exists.
A CPU multiplies float32 by blocks too, which stay in its caches, and with oneDNN: torch.mm calls MKL, which on AMD has
half of its speed.
Knows nothing about losses.

Shapes: C rows of a chunk, D hidden size, V vocabulary, B columns of a block, U chosen columns.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Elements of a block of weights: 4 MiB in float32, about what a core has of the caches.
_BLOCK_ELEMENTS = 2**20


class Projection:
    """``logits = hidden @ weight.T + bias`` with float32 results, or float64 where an input is float64."""

    def __init__(self, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> None:
        wide = torch.float64 if torch.float64 in (hidden_ND.dtype, weight_VD.dtype) else torch.float32
        self.exact = wide
        """The type of everything that comes out."""
        self._narrow = hidden_ND.dtype if hidden_ND.is_cuda and wide == torch.float32 else wide
        self.hidden_ND = hidden_ND.to(self._narrow)
        # On a GPU a float32 weight meets bfloat16 rows in bfloat16; a narrow weight on a CPU stays as it is.
        self._weight_VD = weight_VD.to(self._narrow) if weight_VD.is_cuda or weight_VD.dtype.itemsize > 2 else weight_VD
        self._bias_V = bias_V.to(wide) if bias_V is not None else None

    @property
    def vocabulary(self) -> int:
        return self._weight_VD.shape[0]

    def logits(self, rows: slice, out_CV: Tensor) -> Tensor:
        """Logits of a chunk of rows, written into ``out_CV``."""
        hidden_CD = self.hidden_ND[rows]
        for columns, weight_BD in self._blocks():
            out_CV[:, columns] = self.mm(hidden_CD, weight_BD.T)
        if self._bias_V is not None:
            out_CV += self._bias_V
        return out_CV

    def times_weight(self, gradient_CV: Tensor) -> Tensor:
        """``gradient @ weight``: the gradient of the rows, C x D."""
        total_CD = gradient_CV.new_zeros(gradient_CV.shape[0], self._weight_VD.shape[1])
        for columns, weight_BD in self._blocks():
            total_CD += self.mm(gradient_CV[:, columns], weight_BD)
        return total_CD

    def add_outer(self, total_VD: Tensor, gradient_CV: Tensor, hidden_CD: Tensor, scale: float) -> None:
        """``total += scale * gradient.T @ hidden``: the gradient of the weight."""
        for columns, _ in self._blocks():
            total_VD[columns].add_(self.mm(gradient_CV[:, columns].T, hidden_CD), alpha=scale)

    def columns(self, columns_U: Tensor) -> Tensor:
        """The weight's rows for these words, U x D, ready for ``mm``."""
        return self._weight_VD.index_select(0, columns_U).to(self._narrow)

    def mean_row(self) -> Tensor:
        """About the mean of the weight's rows, D: that of some thousands, evenly spread, is near enough."""
        sample_BD = self._weight_VD[:: max(1, self.vocabulary // 4096)]
        return sample_BD.to(self.exact).mean(dim=0)

    def mm(self, left: Tensor, right: Tensor) -> Tensor:
        """Product in the exact type of factors that are brought to the type this device multiplies."""
        left, right = left.to(self._narrow), right.to(self._narrow)
        if self._narrow != self.exact:
            return torch.mm(left, right, out_dtype=self.exact)
        return _by_one_dnn(left, right) if _one_dnn_serves(left) else torch.mm(left, right)

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """The vocabulary in parts that fit a CPU's caches; in one where that is of no use."""
        cpu = self._weight_VD.device.type == "cpu"
        rows = max(1, _BLOCK_ELEMENTS // self._weight_VD.shape[1]) if cpu else self.vocabulary
        for start in range(0, self.vocabulary, rows):
            columns = slice(start, start + rows)
            yield columns, self._weight_VD[columns].to(self._narrow)


def _one_dnn_serves(factor: Tensor) -> bool:
    return factor.is_cpu and factor.dtype == torch.float32 and torch.backends.mkldnn.is_available()


def _by_one_dnn(left: Tensor, right: Tensor) -> Tensor:
    # The operator that torch.compile calls for a linear layer; torch has no public name for it.
    return torch.ops.mkldnn._linear_pointwise(left, right.T, None, "none", [], "")
