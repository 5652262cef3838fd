"""Column-sparse gradients for objectives whose weight vanishes with p: the backward at a fraction of its cost.

The logit gradient of a DFT token is p (softmax - onehot). Summed over a chunk's rows, most words of a large vocabulary
get next to none of it, flat predictions being weighted down. The words above a tolerance, and the targets, are treated
exactly; the rest, the tail, in two approximations without which training goes wrong:

* Rows of the logit gradient sum to zero, so grad_hidden = G (W - 1 w^T) for any w. With w the mean row of W only the
  tail's deviation from the mean is lost. Rows of an lm_head share a large mean: left out, the error is 20 times larger.
* The tail's part of grad_weight is replaced by its rank-one likeness, column mass x mean hidden state. Adam divides by
  the gradient's size: words whose small gradients were dropped would not move at all, instead of in their direction.

Where the tail is not small, as for random weights, the chunk is left to the dense path.

Shapes: C rows of a chunk, D hidden size, V vocabulary, U chosen words, B of them at a time, K chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlm_dft.heads.gradients import Gradients
from vlm_dft.heads.tile import Tile

# Share of the chunk's weight in the tail above which it is left to the dense path: there the error in grad_hidden, a
# third to a half of this share, would no longer be small.
_LARGEST_TAIL = 0.01
# Share of the vocabulary above which a dense product is as cheap.
_MOST_COLUMNS = 0.5
_BLOCK_ELEMENTS = 2**22
_CHUNKS_PER_FLUSH = 16


class ColumnSparse:
    """Adds chunks to ``gradients``; ``finish`` adds the tails of all of them to the weight's gradient."""

    def __init__(self, gradients: Gradients, tolerance: float) -> None:
        self._gradients = gradients
        self._tolerance = tolerance
        self._mean_D: Tensor | None = None
        self._tails: list[tuple[Tensor, Tensor]] = []

    def add(self, rows: slice, tile: Tile, weight_C: Tensor, labels_C: Tensor) -> bool:
        """Add a chunk's part and use up its tile; False, and nothing done, where the dense path is called for."""
        scale_C = weight_C / tile.sum_C
        mass_V = scale_C @ tile.exp_CV
        chosen_V = mass_V > self._tolerance
        chosen_V[labels_C] = True
        columns_U = chosen_V.nonzero().squeeze(1)
        tail_V = mass_V.masked_fill_(chosen_V, 0)
        # Written so that NaN goes the dense way, where it spreads.
        small = bool(tail_V.sum() <= _LARGEST_TAIL * weight_C.sum())
        if not small or columns_U.numel() > _MOST_COLUMNS * mass_V.numel():
            return False
        # exp x scale is now the whole logit gradient, the target's -1 included.
        tile.exp_CV.scatter_add_(1, labels_C.unsqueeze(1), -tile.sum_C.unsqueeze(1))
        tail_C = self._add_columns(rows, tile, scale_C, columns_U)
        self._add_tail(rows, tail_C, tail_V)
        return True

    def finish(self) -> None:
        """Add what is still held back: call it after the last chunk."""
        if self._tails:
            total_VD = self._gradients.weight_VD
            assert total_VD is not None
            tails_KV, means_KD = (torch.stack(part) for part in zip(*self._tails, strict=True))
            total_VD.addmm_(tails_KV.T, means_KD, alpha=self._gradients.scale)
            self._tails.clear()

    def _add_columns(self, rows: slice, tile: Tile, scale_C: Tensor, columns_U: Tensor) -> Tensor:
        """The exact part; returns each row's tail, which is what its columns lack to sum to zero."""
        gradients, projection = self._gradients, self._gradients.projection
        hidden_CD = projection.hidden_ND[rows]
        tail_C = torch.zeros_like(scale_C)
        total_CD = torch.zeros_like(hidden_CD, dtype=projection.exact)
        for columns_B in columns_U.split(max(1, _BLOCK_ELEMENTS // hidden_CD.shape[1])):
            gradient_CB = tile.exp_CV.index_select(1, columns_B).mul_(scale_C.unsqueeze(1))
            tail_C -= gradient_CB.sum(dim=1)
            if gradients.bias_V is not None:
                gradients.bias_V.index_add_(0, columns_B, gradient_CB.sum(dim=0), alpha=gradients.scale)
            if gradients.hidden_ND is not None:
                total_CD += projection.mm(gradient_CB, projection.columns(columns_B))
            if gradients.weight_VD is not None:
                part_BD = projection.mm(gradient_CB.T, hidden_CD)
                gradients.weight_VD.index_add_(0, columns_B, part_BD, alpha=gradients.scale)
        if gradients.hidden_ND is not None:
            gradients.hidden_ND[rows] = total_CD.mul_(gradients.scale)
        return tail_C.clamp_(min=0)

    def _add_tail(self, rows: slice, tail_C: Tensor, tail_V: Tensor) -> None:
        gradients, projection = self._gradients, self._gradients.projection
        if gradients.bias_V is not None:
            gradients.bias_V.add_(tail_V, alpha=gradients.scale)
        if gradients.hidden_ND is not None:
            if self._mean_D is None:
                self._mean_D = projection.mean_row()
            gradients.hidden_ND[rows].addr_(tail_C, self._mean_D, alpha=gradients.scale)
        total = tail_C.sum()
        if gradients.weight_VD is not None:
            mean_D = (tail_C @ projection.hidden_ND[rows].to(projection.exact)) / total.clamp(min=1e-30)
            self._tails.append((tail_V, mean_D))
            if len(self._tails) == _CHUNKS_PER_FLUSH:
                self.finish()
