"""The head on torch's own chunked ``linear_cross_entropy``: an independent second path for what it can serve.

It gives the target's log-probability and its gradient, and computes the logits twice. Knows nothing else.

Shapes: N supervised rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlm_dft.errors import ConfigError
from vlm_dft.heads.chunks import Request, RowResults
from vlm_dft.objectives import TokenStatistics

_SERVED = frozenset({"ref_logp_N", "segments_N"})


def compute(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, request: Request) -> tuple[Tensor, RowResults]:
    """The differentiable loss times request.scale, and the results of every row. Raises ConfigError where it cannot."""
    function, options = _torch_function()
    _check(hidden_ND, weight_VD, bias_V, request)
    with warnings.catch_warnings(), torch.autocast(hidden_ND.device.type, enabled=False):
        # torch warns and makes full logits where its chunked path does not apply: not with us.
        warnings.simplefilter("error")
        nll_N = function(
            hidden_ND, weight_VD, request.labels_N, linear_bias=bias_V, reduction="none", options=options()
        )
    logp_N = -nll_N.detach()
    weight_N = request.objective.weights(
        TokenStatistics(logp_N, ref_logp_N=request.ref_logp_N, segments_N=request.segments_N)
    )
    loss = (weight_N.double() * nll_N.double()).sum().mul(request.scale).to(nll_N.dtype)
    return loss, RowResults(logp_N, weight_N)


def _torch_function() -> tuple[Callable[..., Tensor], type[Any]]:
    function = getattr(torch.nn.functional, "linear_cross_entropy", None)
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if function is None or options is None:
        raise _cannot(f"it needs torch 2.13 or newer, this is {torch.__version__}")
    return function, options


def _check(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, request: Request) -> None:
    objective = request.objective
    dtypes = {tensor.dtype for tensor in (hidden_ND, weight_VD, bias_V) if tensor is not None}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.float64}:
        found = ", ".join(sorted(str(dtype) for dtype in dtypes))
        raise _cannot(f"it rounds what is narrower than float32, and all inputs must be of one type; they are {found}")
    if request.wanted:
        raise _cannot('it gives the target\'s log-probability alone: set statistics to "target"')
    if objective.needs - _SERVED or objective.kl_weight > 0:
        raise _cannot(f"it has not the statistics that {objective.name} needs")
    if request.tolerance > 0:
        raise _cannot("it is exact: set tolerance to 0")


def _cannot(reason: str) -> ConfigError:
    return ConfigError(f"backend linear_cross_entropy cannot serve: {reason}; or use torch", param="backend")
