"""The product of rows with an lm_head and its two gradients, exact whatever the types.

Float32 and float64 are multiplied as they are. A GPU multiplies narrow types and accumulates into float32. A CPU has no
such product: narrow weights are widened a block of the vocabulary at a time, so that no wide copy of them ever exists.
Knows nothing about losses.

Shapes: C rows of a chunk, D hidden size, V vocabulary, B columns of a block, U chosen columns.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Elements of a widened block of weights: 16 MiB in float32.
_BLOCK_ELEMENTS = 2**22


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

    @property
    def _as_is(self) -> bool:
        return self._weight_VD.dtype == self._narrow

    def logits(self, rows: slice, out_CV: Tensor) -> Tensor:
        """Logits of a chunk of rows, written into ``out_CV``."""
        hidden_CD = self.hidden_ND[rows]
        if self._as_is and self._narrow == self.exact:
            torch.mm(hidden_CD, self._weight_VD.T, out=out_CV)
        elif self._as_is:
            out_CV.copy_(self.mm(hidden_CD, self._weight_VD.T))
        else:
            for columns, weight_BD in self._blocks():
                out_CV[:, columns] = torch.mm(hidden_CD, weight_BD.T)
        if self._bias_V is not None:
            out_CV += self._bias_V
        return out_CV

    def times_weight(self, gradient_CV: Tensor) -> Tensor:
        """``gradient @ weight``: the gradient of the rows, C x D."""
        if self._as_is:
            return self.mm(gradient_CV, self._weight_VD)
        total_CD = gradient_CV.new_zeros(gradient_CV.shape[0], self._weight_VD.shape[1])
        for columns, weight_BD in self._blocks():
            total_CD.addmm_(gradient_CV[:, columns], weight_BD)
        return total_CD

    def add_outer(self, total_VD: Tensor, gradient_CV: Tensor, rows: slice, scale: float) -> None:
        """``total += scale * gradient.T @ hidden``: the gradient of the weight."""
        if self._narrow == self.exact:
            total_VD.addmm_(gradient_CV.T, self.hidden_ND[rows], alpha=scale)
        else:
            total_VD.add_(self.mm(gradient_CV.T, self.hidden_ND[rows]), alpha=scale)

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
        return torch.mm(left, right) if self._narrow == self.exact else torch.mm(left, right, out_dtype=self.exact)

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        rows = max(1, _BLOCK_ELEMENTS // self._weight_VD.shape[1])
        for start in range(0, self.vocabulary, rows):
            columns = slice(start, start + rows)
            yield columns, self._weight_VD[columns].to(self._narrow)
