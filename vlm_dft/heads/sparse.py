"""Column-sparse gradients for objectives whose weight vanishes with p: the backward at a fraction of its cost.

The logit gradient of a DFT token is p (softmax - onehot). Most rows of it are next to zero in most words of a large
vocabulary: sure predictions because of the softmax, poor ones because of p. So, of a chunk:

* The targets and the words whose mass is above a tolerance, exactly.
* The other words, the tail. Rows of the logit gradient sum to zero, so grad_hidden = G (W - 1 w^T) for any w: with w
  the mean row of W only the tail's deviation from the mean is lost, where rows of an lm_head share a large mean.
* In grad_weight the tail of the few broadest rows, which outweigh all others, is kept as it is; that of the others is
  replaced by its rank-one likeness, column mass x mean hidden state. Adam divides by the gradient's size, so that words
  whose small gradients were dropped would not move at all, instead of in their direction.

Broad rows are taken out first and get all words, or theirs would be those of all rows; where they are all there are,
as with a few rows or with poor ones alone, nothing is left out.

Where too much is left over, as with random weights, the chunk is left to the dense path.

How far 60 steps of AdamW move the head, beside the exact run (the benchmarks' peaked fixture, learning rate 1e-4):

  rows x hidden x vocabulary      tolerance 1e-7       1e-6       1e-5    TRL in bfloat16
   96 x 256 x 16,384   cosine          0.9988     0.9905     0.9767    0.9999
                       distance         4.8 %     13.8 %     21.5 %     1.5 %
  128 x 512 x 65,536   cosine          0.9997     0.9991     0.9982    1.0000
                       distance         2.3 %      4.2 %      5.9 %     0.7 %

Hence 1e-6 for the trainer: the cosine stays above 0.99 for small vocabularies too. 1e-5 saves a tenth of the time.

Shapes: C rows of a chunk, D hidden size, V vocabulary, U chosen words, B of them at a time, R broad rows, K held rows.
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
# A word is chosen by its mass over all rows of a chunk: one product, no passes over the tile. That this many rows share
# a tolerance makes it about as exact as if each row's entry had to be below it, whatever the size of the chunk.
_ROWS_PER_TOLERANCE = 64
# One row in so many is broad: more cost time, fewer exactness.
_ROWS_PER_BROAD = 8
_FEWEST_BROAD = 4
# Broad rows held back before their product with the vocabulary, which costs little more for many than for one.
_HELD_ROWS = 32
_HELD_TAILS = 8
_BLOCK_ELEMENTS = 2**20


class ColumnSparse:
    """Adds chunks to ``gradients``; ``finish`` adds what was held back."""

    def __init__(self, gradients: Gradients, tolerance: float) -> None:
        self._gradients = gradients
        self._tolerance = tolerance
        self._mean_D: Tensor | None = None
        # The others' tails, from row _HELD_TAILS downwards, and logit gradients of broad rows from there upwards: one
        # buffer, as they are large, so filled that what is used is in one piece.
        self._held_KV: Tensor | None = None
        self._broad: list[tuple[Tensor, Tensor, Tensor]] = []
        self._tail_states: list[Tensor] = []

    def add(self, rows: slice, tile: Tile, weight_C: Tensor, labels_C: Tensor) -> bool:
        """Add a chunk's part and use up its tile; False, and nothing done, where the dense path is called for."""
        exp_CV, scale_C = tile.exp_CV, weight_C / tile.sum_C
        mass_V = torch.mv(exp_CV.T, scale_C, out=self._room_for_tail(exp_CV))
        broad_R = self._broadest(exp_CV, scale_C, weight_C, mass_V > self._limit(weight_C.numel()))
        broad_RV = self._room_for(broad_R.numel())
        torch.index_select(exp_CV, 0, broad_R, out=broad_RV).mul_(scale_C[broad_R].unsqueeze(1))
        scale_C.index_fill_(0, broad_R, 0)  # the other rows, from here on
        mass_V.sub_(broad_RV.sum(dim=0)).clamp_(min=0)
        columns_U = self._columns(mass_V, labels_C)
        tail_V = mass_V.index_fill_(0, columns_U, 0)
        # Written so that NaN goes the dense way, where it spreads.
        small = bool(tail_V.sum() <= _LARGEST_TAIL * weight_C.sum())
        if not small or columns_U.numel() > _MOST_COLUMNS * mass_V.numel():
            return False
        # exp x scale is now the whole logit gradient, the target's -1 included.
        exp_CV.scatter_add_(1, labels_C.unsqueeze(1), -tile.sum_C.unsqueeze(1))
        self._add_others(rows, exp_CV, scale_C, columns_U, tail_V)
        self._broad.append((rows.start + broad_R, weight_C[broad_R], labels_C[broad_R]))
        if self._num_broad >= _HELD_ROWS or len(self._tail_states) >= _HELD_TAILS:
            self.finish()
        return True

    def finish(self) -> None:
        """Add what is held back: call it after the last chunk."""
        if not self._broad:
            return
        assert self._held_KV is not None
        gradients, projection = self._gradients, self._gradients.projection
        rows_K, weight_K, labels_K = (torch.cat(part) for part in zip(*self._broad, strict=True))
        gradient_KV = self._held_KV[_HELD_TAILS : _HELD_TAILS + rows_K.numel()]
        gradient_KV.scatter_add_(1, labels_K.unsqueeze(1), -weight_K.unsqueeze(1))
        if gradients.bias_V is not None:
            gradients.bias_V.add_(gradient_KV.sum(dim=0), alpha=gradients.scale)
        if gradients.hidden_ND is not None:
            gradients.hidden_ND[rows_K] = projection.times_weight(gradient_KV).mul_(gradients.scale)
        if gradients.weight_VD is not None:
            all_KV = self._held_KV[_HELD_TAILS - len(self._tail_states) : _HELD_TAILS + rows_K.numel()]
            states = [*reversed(self._tail_states), *projection.hidden_ND[rows_K].to(projection.exact)]
            projection.add_outer(gradients.weight_VD, all_KV, torch.stack(states), gradients.scale)
        self._broad.clear()
        self._tail_states.clear()

    @property
    def _num_broad(self) -> int:
        return sum(rows.numel() for rows, *_ in self._broad)

    def _room_for_tail(self, exp_CV: Tensor) -> Tensor:
        """The row of the buffer before those that are held."""
        if self._held_KV is None:
            # No chunk has more rows than the first.
            rows = _HELD_TAILS + _HELD_ROWS - 1 + _num_broad(exp_CV.shape[0])
            self._held_KV = exp_CV.new_empty(rows, exp_CV.shape[1])
        return self._held_KV[_HELD_TAILS - 1 - len(self._tail_states)]

    def _room_for(self, num_rows: int) -> Tensor:
        """Rows of the buffer after those that are held."""
        assert self._held_KV is not None
        return self._held_KV[_HELD_TAILS + self._num_broad :][:num_rows]

    def _limit(self, num_rows: int) -> float:
        return self._tolerance * num_rows / _ROWS_PER_TOLERANCE

    def _columns(self, mass_V: Tensor, labels_C: Tensor) -> Tensor:
        """The words to treat exactly, in order."""
        chosen_V = mass_V > self._limit(labels_C.numel())
        chosen_V[labels_C] = True
        return chosen_V.nonzero().squeeze(1)

    def _broadest(self, exp_CV: Tensor, scale_C: Tensor, weight_C: Tensor, common_V: Tensor) -> Tensor:
        """The rows with most mass outside the words that most rows have theirs in."""
        inside_C = exp_CV.index_select(1, common_V.nonzero().squeeze(1)).sum(dim=1).mul_(scale_C)
        return (weight_C - inside_C).topk(_num_broad(weight_C.numel())).indices

    @property
    def _block(self) -> int:
        """So many words at a time, lest their part of the weight be copied as a whole."""
        return max(1, _BLOCK_ELEMENTS // self._gradients.projection.hidden_ND.shape[1])

    def _mean_row(self) -> Tensor:
        if self._mean_D is None:
            self._mean_D = self._gradients.projection.mean_row()
        return self._mean_D

    def _add_others(self, rows: slice, exp_CV: Tensor, scale_C: Tensor, columns_U: Tensor, tail_V: Tensor) -> None:
        """Rows that are not broad; a broad row's scale is 0."""
        gradients, projection = self._gradients, self._gradients.projection
        hidden_CD = projection.hidden_ND[rows]
        tail_C = torch.zeros_like(scale_C)  # what a row's columns lack to sum to zero
        total_CD = torch.zeros_like(hidden_CD, dtype=projection.exact)
        for columns_B in columns_U.split(self._block):
            gradient_CB = exp_CV.index_select(1, columns_B).mul_(scale_C.unsqueeze(1))
            tail_C -= gradient_CB.sum(dim=1)
            if gradients.bias_V is not None:
                gradients.bias_V.index_add_(0, columns_B, gradient_CB.sum(dim=0), alpha=gradients.scale)
            if gradients.hidden_ND is not None:
                total_CD += projection.mm(gradient_CB, projection.columns(columns_B))
            if gradients.weight_VD is not None:
                part_BD = projection.mm(gradient_CB.T, hidden_CD)
                gradients.weight_VD.index_add_(0, columns_B, part_BD, alpha=gradients.scale)
        tail_C.clamp_(min=0)
        if gradients.bias_V is not None:
            gradients.bias_V.add_(tail_V, alpha=gradients.scale)
        if gradients.hidden_ND is not None:
            gradients.hidden_ND[rows] = total_CD.addr_(tail_C, self._mean_row()).mul_(gradients.scale)
        if gradients.weight_VD is not None:
            self._tail_states.append(_mean_state(tail_C, hidden_CD.to(projection.exact)))


def _num_broad(num_rows: int) -> int:
    return min(num_rows, max(_FEWEST_BROAD, num_rows // _ROWS_PER_BROAD))


def _mean_state(tail_C: Tensor, hidden_CD: Tensor) -> Tensor:
    return (tail_C @ hidden_CD) / tail_C.sum().clamp(min=torch.finfo(tail_C.dtype).tiny)
