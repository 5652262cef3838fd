"""The gradients of one call as they add up, dense: every word of the vocabulary.

Knows nothing about objectives: it is given weights.

Shapes: N rows, C rows of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlm_dft.heads.projection import Projection
from vlm_dft.heads.tile import Tile


class Gradients:
    """Gradients of ``scale * (sum of weight x NLL + kl_weight x KL)``; those that nobody needs are None."""

    def __init__(self, projection: Projection, bias_V: Tensor | None, needs: tuple[bool, ...], scale: float) -> None:
        need_hidden, need_weight, need_bias = needs
        hidden_ND, exact = projection.hidden_ND, projection.exact
        shape_VD = (projection.vocabulary, hidden_ND.shape[1])
        self.projection = projection
        self.scale = scale
        self.hidden_ND = torch.empty_like(hidden_ND, dtype=exact) if need_hidden else None
        self.weight_VD = zeros(shape_VD, exact, hidden_ND.device) if need_weight else None
        self.bias_V = torch.zeros_like(bias_V, dtype=exact) if need_bias and bias_V is not None else None

    @property
    def wanted(self) -> bool:
        return not (self.hidden_ND is None and self.weight_VD is None and self.bias_V is None)

    def add(self, rows: slice, tile: Tile, weight_C: Tensor, labels_C: Tensor, kl_weight: float) -> None:
        """Add a chunk's part; the tile's softmax is used up."""
        # d(w NLL)/dlogits = w (softmax - onehot) and d(k KL)/dlogits = k (softmax - reference), w being a constant.
        gradient_CV = tile.exp_CV.mul_(((weight_C + kl_weight) / tile.sum_C).unsqueeze(1))
        if tile.reference_CV is not None:
            gradient_CV.sub_(tile.reference_CV, alpha=kl_weight)
        gradient_CV.scatter_add_(1, labels_C.unsqueeze(1), -weight_C.unsqueeze(1))
        if self.bias_V is not None:
            self.bias_V.add_(gradient_CV.sum(dim=0), alpha=self.scale)
        if self.hidden_ND is not None:
            self.hidden_ND[rows] = self.projection.times_weight(gradient_CV).mul_(self.scale)
        if self.weight_VD is not None:
            self.projection.add_outer(self.weight_VD, gradient_CV, self.projection.hidden_ND[rows], self.scale)


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: Any) -> Tensor:
    """Like torch.zeros. A large tensor on a CPU comes from numpy, which asks the kernel for huge pages that are zero
    already: at 151,936 x 896 that is a sixth of the time, which would be a quarter of the whole head's."""
    if torch.device(device).type != "cpu" or math.prod(shape) < 2**20:
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(shape, dtype=np.float64 if dtype == torch.float64 else np.float32))
