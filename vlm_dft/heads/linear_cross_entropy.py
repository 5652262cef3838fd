"""The head on torch's own chunked ``linear_cross_entropy``: an independent second path to the loss and its gradients.

Torch gives the target's log-probability and its gradient. Statistics and weights come from the torch backend, so that
every objective but an anchored one is served; the price is three products with the vocabulary where that has one.
Knows nothing else.

Shapes: N supervised rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlm_dft.errors import ConfigError
from vlm_dft.heads import chunks
from vlm_dft.heads.chunks import Request, RowResults
from vlm_dft.heads.projection import Projection
from vlm_dft.objectives import Objective


def compute(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, request: Request) -> tuple[Tensor, RowResults]:
    """The differentiable loss times request.scale, and the results of every row, of what ``check`` has let pass."""
    function, options = _torch_function()
    with warnings.catch_warnings(), torch.autocast(hidden_ND.device.type, enabled=False):
        # torch warns and makes full logits where its chunked path does not apply: not with us.
        warnings.simplefilter("error")
        nll_N = function(
            hidden_ND, weight_VD, request.labels_N, linear_bias=bias_V, reduction="none", options=options()
        )
    with torch.no_grad():
        results, _ = chunks.compute(Projection(hidden_ND, weight_VD, bias_V), bias_V, request, (False, False, False))
    loss = (results.weight_N.double() * nll_N.double()).sum().mul(request.scale).to(nll_N.dtype)
    return loss, results


def _torch_function() -> tuple[Callable[..., Tensor], type[Any]]:
    function = getattr(torch.nn.functional, "linear_cross_entropy", None)
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if function is None or options is None:
        raise _cannot(f"it needs torch 2.13 or newer, this is {torch.__version__}")
    return function, options


def check(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, objective: Objective) -> None:
    """Raises ConfigError where it cannot serve such tensors or this objective."""
    _torch_function()
    dtypes = {tensor.dtype for tensor in (hidden_ND, weight_VD, bias_V) if tensor is not None}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.float64}:
        found = ", ".join(sorted(str(dtype) for dtype in dtypes))
        raise _cannot(f"it rounds what is narrower than float32, and all inputs must be of one type; they are {found}")
    if objective.needs_reference:
        raise _cannot(f"it has not the reference model's distribution that {objective.name} needs")


def _cannot(reason: str) -> ConfigError:
    return ConfigError(
        f"head_backend linear_cross_entropy cannot serve: {reason}; or use torch", param="train.head_backend"
    )
