"""The head as Triton kernels for CUDA: logits live in tiles on the chip, forward and backward.

The forward pass keeps a few numbers per row; the objective weighs rows in torch between the two passes, as everywhere.
The backward pass makes logits again, a panel of the vocabulary at a time: one kernel writes the panel's logit gradient
in the inputs' type, and two products of torch turn it into its part of the hidden states' and all of its words'
gradients. Nothing is added by atomics, so that the same inputs give the same bits.

Serves every objective but those anchored to a reference model; exact, without column sparsity. Its speed is unknown:
it was compared with the torch backend in Triton's interpreter on a CPU and has been timed nowhere, which is why
``backend="auto"`` does not choose it. Triton comes with torch for CUDA; elsewhere

    pip install triton && pytest tests/test_head_triton.py

runs the comparison in the interpreter (TRITON_INTERPRET=1, set before triton is imported), and that on CUDA tensors
where there is such a device. Knows nothing about shapes that do not fit or what is summed up in the end.

Shapes: N supervised rows, D hidden size, V vocabulary, P words of a panel, S splits of the vocabulary, K largest.
"""

from __future__ import annotations

import importlib
import math
import os
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Self

import torch
from torch import Tensor

from vlm_dft.errors import ConfigError
from vlm_dft.heads.chunks import Request, RowResults
from vlm_dft.heads.projection import Projection
from vlm_dft.objectives import TOP_K, Objective, TokenStatistics

# A tile of logits; its third side is _TILE_BYTES of features. Not tuned: small enough for every card since Ampere.
_TILE_N = 128
_TILE_V = 128
_TILE_BYTES = 128
_LAUNCH = {"num_warps": 8, "num_stages": 2}
# Programs that keep a large GPU busy: few rows are made up for by more splits. Not the device's own number, so that
# every device adds in the same order.
_PROGRAMS = 512
# Elements of a panel of logit gradients: 128 MiB in bfloat16.
_PANEL_ELEMENTS = 2**26


def compute(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, request: Request) -> tuple[Tensor, RowResults]:
    """The differentiable loss times request.scale, and the results of every row, of what ``check`` has let pass."""
    held: list[RowResults] = []
    loss = _Loss.apply(hidden_ND, weight_VD, bias_V, request, _kernels(hidden_ND), held)
    return loss, held[0]


def check(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, objective: Objective) -> None:
    """Raises ConfigError where it cannot serve such tensors or this objective."""
    if not {hidden_ND.dtype, weight_VD.dtype} <= {torch.float32, torch.bfloat16}:
        raise _cannot(
            f"hidden states and weight must be float32 or bfloat16; they are {hidden_ND.dtype} and {weight_VD.dtype}"
        )
    if objective.needs_reference:
        raise _cannot(f"it has not the reference model's distribution that {objective.name} needs")
    _kernels(hidden_ND)


def _kernels(hidden_ND: Tensor) -> ModuleType:
    """The kernels, for where these rows are."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not hidden_ND.is_cuda and not interpreted:
        raise _cannot(
            f"it needs CUDA and the hidden states are on {hidden_ND.device} "
            "(TRITON_INTERPRET=1 in the environment runs it on a CPU, slowly, for tests)"
        )
    try:
        kernels = importlib.import_module("vlm_dft.heads.triton_kernels")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "triton":
            raise
        raise _cannot("triton is not installed: pip install triton, the version that torch names") from error
    if not hidden_ND.is_cuda and not kernels.INTERPRETED:
        raise _cannot("TRITON_INTERPRET=1 was set after triton was imported: set it before the process starts")
    return kernels


def _cannot(reason: str) -> ConfigError:
    return ConfigError(f"head_backend triton cannot serve: {reason}; or use torch", param="train.head_backend")


@dataclass(frozen=True)
class _Inputs:
    """What both passes read, laid out as the kernels expect it."""

    kernels: ModuleType
    hidden_ND: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None
    labels_N: Tensor

    @classmethod
    def of(
        cls, kernels: ModuleType, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_N: Tensor
    ) -> Self:
        # The rows' type is that of computation: a float32 weight under training meets bfloat16 rows in bfloat16.
        narrow_VD = weight_VD.to(hidden_ND.dtype).contiguous()
        wide_V = bias_V.float().contiguous() if bias_V is not None else None
        return cls(kernels, hidden_ND.contiguous(), narrow_VD, wide_V, labels_N)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        bias_V = self.bias_V if self.bias_V is not None else self.labels_N  # not read
        return self.hidden_ND, self.weight_VD, bias_V, self.labels_N

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.hidden_ND.shape[0], self.weight_VD.shape[0], self.weight_VD.shape[1]

    @property
    def constants(self) -> dict[str, Any]:
        return {
            "HAS_BIAS": self.bias_V is not None,
            "WIDEN": self.kernels.INTERPRETED,
            "TILE_N": _TILE_N,
            "TILE_V": _TILE_V,
            "TILE_D": _TILE_BYTES // self.hidden_ND.dtype.itemsize,
            **_LAUNCH,
        }


def _statistics(inputs: _Inputs, *, want_top: bool) -> dict[str, Tensor]:
    """By name, each of N: largest, sum, logp, entropy_N, correct, sum_p2_N and, where wanted, top_entropy_N."""
    num_rows, vocabulary, _ = inputs.sizes
    row_tiles, word_tiles = math.ceil(num_rows / _TILE_N), math.ceil(vocabulary / _TILE_V)
    words_per_split = math.ceil(word_tiles / max(1, _PROGRAMS // row_tiles)) * _TILE_V
    num_splits = math.ceil(vocabulary / words_per_split)
    partial_5SN = inputs.hidden_ND.new_empty((5, num_splits, num_rows), dtype=torch.float32)
    top_SNK = partial_5SN.new_empty((num_splits, num_rows, inputs.kernels.TOP.value) if want_top else 1)
    inputs.kernels.statistics_kernel[(row_tiles, num_splits)](
        *inputs.tensors, partial_5SN, top_SNK, *inputs.sizes, words_per_split, num_splits * num_rows,
        WANT_TOP=want_top, **inputs.constants,
    )  # fmt: skip
    largest_SN, sum_SN, sum_x_SN, squares_SN, target_SN = partial_5SN
    largest_N = largest_SN.amax(dim=0)
    step_SN = largest_SN - largest_N
    shrink_SN = step_SN.exp()
    sum_N = (shrink_SN * sum_SN).sum(dim=0)
    log_sum_N = sum_N.log()
    target_N = target_SN.sum(dim=0)
    found = {
        "largest": largest_N,
        "sum": sum_N,
        "logp": target_N - largest_N - log_sum_N,
        "entropy_N": log_sum_N - (shrink_SN * (sum_x_SN + sum_SN * step_SN)).sum(dim=0) / sum_N,
        "correct": target_N >= largest_N,
        "sum_p2_N": (shrink_SN.square() * squares_SN).sum(dim=0) / sum_N.square(),
    }
    if want_top:
        top_NK = top_SNK.movedim(0, 1).flatten(1).topk(min(TOP_K, vocabulary), dim=1).values
        found["top_entropy_N"] = _entropy(top_NK)
    return found


def _entropy(logits_NK: Tensor) -> Tensor:
    logp_NK = logits_NK.log_softmax(dim=1)
    return -(logp_NK.exp() * logp_NK).sum(dim=1)


def _gradients(
    inputs: _Inputs,
    largest_N: Tensor,
    share_N: Tensor,
    coefficient_N: Tensor,
    needs: tuple[bool, ...],
    weight_dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden states, weight and bias, as far as they are needed, from the logit gradient of each panel."""
    need_hidden, need_weight, need_bias = needs
    num_rows, vocabulary, _ = inputs.sizes
    hidden_ND, weight_VD = inputs.hidden_ND, inputs.weight_VD
    projection = Projection(hidden_ND, weight_VD[:1], None)  # for its products, exact on every device
    total_ND = torch.zeros_like(hidden_ND, dtype=torch.float32) if need_hidden else None
    grad_VD = torch.empty_like(weight_VD, dtype=weight_dtype) if need_weight else None
    grad_V = hidden_ND.new_empty(vocabulary, dtype=torch.float32) if need_bias else None
    panel_words = max(1, _PANEL_ELEMENTS // num_rows // _TILE_V) * _TILE_V
    for first in range(0, vocabulary, panel_words):
        words = slice(first, min(first + panel_words, vocabulary))
        num_words = words.stop - first
        gradient_NP = hidden_ND.new_empty(num_rows, num_words)
        inputs.kernels.gradient_kernel[(math.ceil(num_rows / _TILE_N), math.ceil(num_words / _TILE_V))](
            *inputs.tensors, largest_N, share_N, coefficient_N, gradient_NP, *inputs.sizes, first, num_words,
            **inputs.constants,
        )  # fmt: skip
        if total_ND is not None:
            total_ND += projection.mm(gradient_NP, weight_VD[words])
        if grad_VD is not None:
            grad_VD[words] = projection.mm(gradient_NP.T, hidden_ND)
        if grad_V is not None:
            grad_V[words] = gradient_NP.sum(dim=0, dtype=torch.float32)
    return total_ND, grad_VD, grad_V


class _Loss(torch.autograd.Function):
    """The loss of gathered rows, times request.scale."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        request: Request,
        kernels: ModuleType,
        held: list[RowResults],
    ) -> Tensor:
        inputs = _Inputs.of(kernels, hidden_ND, weight_VD, bias_V, request.labels_N)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            found = _statistics(inputs, want_top="top_entropy_N" in request.objective.needs)
            weight_N = request.objective.weights(
                TokenStatistics(
                    logp_N=found["logp"],
                    entropy_N=found["entropy_N"],
                    top_entropy_N=found.get("top_entropy_N"),
                    sum_p2_N=found["sum_p2_N"],
                    ref_logp_N=request.ref_logp_N.float() if request.ref_logp_N is not None else None,
                    segments_N=request.segments_N,
                )
            )
            loss = (weight_N.double() * -found["logp"].double()).sum().mul(request.scale).float()
        wanted = {name: found[name] if name in request.wanted else None for name in ("entropy_N", "correct")}
        held.append(RowResults(found["logp"], weight_N, wanted["entropy_N"], wanted["correct"]))
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, request.labels_N, found["largest"], found["sum"], weight_N)
        ctx.kernels, ctx.scale = kernels, request.scale
        return loss

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("objective_loss has no second derivative: take gradients without create_graph")
        hidden_ND, weight_VD, bias_V, labels_N, largest_N, sum_N, weight_N = ctx.saved_tensors
        inputs = _Inputs.of(ctx.kernels, hidden_ND, weight_VD, bias_V, labels_N)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            coefficient_N = weight_N.float() * (grad_outputs[0].float() * ctx.scale)
            gradients = _gradients(
                inputs, largest_N, coefficient_N / sum_N, coefficient_N, ctx.needs_input_grad[:3], weight_VD.dtype
            )
        leaves = (hidden_ND, weight_VD, bias_V)
        return *(
            gradient.to(leaf.dtype) if gradient is not None and leaf is not None else None
            for gradient, leaf in zip(gradients, leaves, strict=True)
        ), None, None, None  # fmt: skip
