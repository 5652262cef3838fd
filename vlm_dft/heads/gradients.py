"""The gradients of one call as they add up, dense: every word of the vocabulary.

Knows nothing about objectives: it is given weights.

Shapes: N rows, C rows of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
import sys
import threading
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
        self.weight_VD = zeros(shape_VD, exact, hidden_ND.device, again=True) if need_weight else None
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


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: Any, *, again: bool = False) -> Tensor:
    """Like torch.zeros. A large tensor on a CPU comes from numpy, which asks the kernel for huge pages that are zero
    already: at 151,936 x 896 that is a sixth of the time, which would be a quarter of the whole head's.

    again: once nobody holds it any more its memory serves the next call for the same shape, as a training step's does
    for the next step's. It stays with the process: new pages are dear where memory is in use and in pieces."""
    if torch.device(device).type != "cpu" or math.prod(shape) < 2**20:
        return torch.zeros(shape, dtype=dtype, device=device)
    numpy_dtype = np.float64 if dtype == torch.float64 else np.float32
    if not again:
        return torch.from_numpy(np.zeros(shape, dtype=numpy_dtype))
    with _lock:
        if _kept and _kept[0].shape == shape and _kept[0].dtype == numpy_dtype and sys.getrefcount(_kept[0]) == _UNUSED:
            _kept[0].fill(0)
        else:
            _kept.clear()
            _kept.append(np.zeros(shape, dtype=numpy_dtype))
        return torch.from_numpy(_kept[0])  # holds the array for as long as its own memory is held


_lock = threading.Lock()
_kept: list[np.ndarray] = []
"""At most one."""
_UNUSED = 2
"""References to an array that nothing but the list and the question holds."""
