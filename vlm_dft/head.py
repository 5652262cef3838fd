"""The loss head: hidden states, lm_head and labels -> loss sum, token count and statistics, without N x V logits.

Supervised rows are gathered first; a chunk of them at a time meets the whole vocabulary, and its gradients are taken at
once, while the chunk's softmax is at hand: nothing is recomputed in the backward pass (``vlm_dft.heads``).
Knows nothing about models, batches or optimizers; sums are returned, the caller divides once by the global count.

Shapes: N rows, D hidden size, V vocabulary, S statistics, M supervised rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

import torch
from torch import Tensor

from vlm_dft import objectives
from vlm_dft.errors import ConfigError
from vlm_dft.heads import linear_cross_entropy, triton_head
from vlm_dft.heads.chunks import Request, RowResults, compute
from vlm_dft.heads.projection import Projection
from vlm_dft.hyperparameters import HeadBackend
from vlm_dft.objectives import Objective

IGNORED: Final = -100
"""The label of a row that is not supervised."""

BACKENDS: Final = get_args(HeadBackend)
_OTHERS: Final = {"linear_cross_entropy": linear_cross_entropy, "triton": triton_head}
"""Backends that cannot serve everything."""

STATISTICS: Final = (
    "objective_sum",
    "nll_sum",
    "weight_sum",
    "weight_sq_sum",
    "p_below_01_count",
    "p_above_09_count",
    "correct_count",
    "entropy_sum",
    "eos_nll_sum",
    "eos_count",
    "num_tokens",
    "kl_sum",
)
"""What the entries of LossSums.statistics_S are: sums and counts over supervised tokens, never means."""

# Elements of one chunk's logits: large enough for an efficient matmul, small beside the model.
_CHUNK_ELEMENTS_CPU: Final = 10 * 2**20
_CHUNK_ELEMENTS_GPU: Final = 2**27


@dataclass(frozen=True)
class LossSums:
    """Sums over the supervised rows of one call."""

    loss_sum: Tensor
    """Sum of weight x NLL, and of kl_weight x KL, 0-d, differentiable; zero with a graph when nothing is supervised."""
    num_tokens: int
    """Supervised rows."""
    statistics_S: Tensor
    """float64, detached, in the order of STATISTICS; add them over calls and ranks, divide last."""
    loss: Tensor
    """loss_sum / denominator: its backward pass scales no gradient again, which saves a pass over the weight's."""
    logp_M: Tensor
    """Log-probability of each supervised row's target, in the order of the rows, detached."""
    weight_M: Tensor
    """The objective's weight of each, detached."""
    sparse_tokens: int = 0
    """Supervised rows whose gradients were column-sparse."""

    def named(self) -> dict[str, float]:
        """Statistics by name; waits for the device."""
        return dict(zip(STATISTICS, self.statistics_S.tolist(), strict=True))


def objective_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    *,
    objective: str | Objective = "dft",
    bias_V: Tensor | None = None,
    eos_token_id: int | None = None,
    denominator: float = 1.0,
    chunk_rows: int | None = None,
    tolerance: float = 0.0,
    backend: str = "auto",
    statistics: Literal["all", "target"] = "all",
    segments_N: Tensor | None = None,
    ref_logp_N: Tensor | None = None,
    ref_hidden_ND: Tensor | None = None,
    ref_weight_VD: Tensor | None = None,
    ref_bias_V: Tensor | None = None,
) -> LossSums:
    """Sum of weight x NLL of ``labels_N`` under ``softmax(hidden_ND @ weight_VD.T + bias_V)``.

    Labels stand beside the row that predicts them (already shifted); -100 marks a row that is not supervised. Softmax
    and statistics are float32 (float64 for float64 inputs), whatever the inputs' type and any autocast. Gradients are
    computed only for inputs that require them. ``chunk_rows`` bounds memory: chunk_rows x V logits exist at once.

    ``tolerance`` permits column-sparse gradients (``vlm_dft.heads.sparse``) where the objective's weight vanishes with
    p: words whose weight x probability, summed over a chunk's rows, is not above it are approximated. The loss stays
    exact. 0: exact gradients. 1e-6: errors below 1e-3; 1e-5 is a tenth faster, its errors are 3 to 5 times as large.

    ``statistics="target"`` leaves out what needs more than the target's log-probability: entropy_sum and correct_count
    are NaN. ``backend``: torch serves everything, and auto is torch; linear_cross_entropy is torch's own, for float32
    and float64; triton needs CUDA. Neither serves an anchor to a reference model; both are exact at any tolerance.
    ``segments_N`` says which sequence a row belongs to, whole sequences in one call; ``ref_logp_N`` is the target's
    log-probability under a reference model; ``ref_hidden_ND``, ``ref_weight_VD`` and ``ref_bias_V`` are such a model's
    states and head. Objectives that need them say so (``Objective.needs_...``), others do not look at them.

    Raises ValueError for shapes that do not fit, IndexError for labels outside the vocabulary, ConfigError for an
    unknown objective, for what an objective needs and was not given, and for a backend that cannot serve.
    """
    chosen = objective if isinstance(objective, Objective) else objectives.objective(objective)
    _check_shapes(hidden_ND, weight_VD, labels_N, bias_V)
    _check_settings(denominator, chunk_rows, tolerance, statistics)
    check_backend(backend, chosen, hidden_ND, weight_VD, bias_V)
    _check_references(chosen, hidden_ND, weight_VD, segments_N, ref_logp_N, ref_hidden_ND, ref_weight_VD)
    rows_M = _supervised_rows(labels_N, weight_VD.shape[0])
    if rows_M.numel() == 0:
        return _nothing(hidden_ND, weight_VD, bias_V)
    reference = None
    if chosen.needs_reference and ref_hidden_ND is not None and ref_weight_VD is not None:
        reference = Projection(ref_hidden_ND[rows_M].detach(), ref_weight_VD.detach(), ref_bias_V)
    request = Request(
        labels_N=labels_N[rows_M].long(),
        objective=chosen,
        wanted=frozenset({"entropy_N", "correct"} if statistics == "all" else ()),
        chunk_rows=chunk_rows or _default_chunk_rows(weight_VD),
        tolerance=tolerance,
        scale=1 / denominator,
        reference=reference,
        ref_logp_N=ref_logp_N[rows_M] if chosen.needs_ref_logp and ref_logp_N is not None else None,
        segments_N=_numbered(segments_N[rows_M]) if chosen.needs_segments and segments_N is not None else None,
    )
    if backend in _OTHERS:
        loss, results = _OTHERS[backend].compute(hidden_ND[rows_M], weight_VD, bias_V, request)
    else:
        held: list[RowResults] = []
        loss = _Head.apply(hidden_ND[rows_M], weight_VD, bias_V, request, held, torch.is_grad_enabled())
        (results,) = held
    return LossSums(
        loss_sum=loss if denominator == 1 else loss * denominator,
        num_tokens=rows_M.numel(),
        statistics_S=_summarise(results, request, eos_token_id),
        loss=loss,
        logp_M=results.logp_N,
        weight_M=results.weight_N,
        sparse_tokens=results.sparse_rows,
    )


def check_backend(
    backend: str, objective: Objective, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None = None
) -> None:
    """Whether the backend can serve tensors like these, of whatever N. Raises ConfigError with reason and remedy."""
    if backend not in BACKENDS:
        raise ConfigError(f"unknown backend {backend!r}: there are {', '.join(BACKENDS)}", param="train.head_backend")
    if backend in _OTHERS:
        _OTHERS[backend].check(hidden_ND, weight_VD, bias_V, objective)


def _check_shapes(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, bias_V: Tensor | None) -> None:
    for name, tensor in {"hidden": hidden_ND, "weight": weight_VD, "bias": bias_V}.items():
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, not {tensor.dtype}")
    if hidden_ND.ndim != 2 or weight_VD.ndim != 2 or hidden_ND.shape[1] != weight_VD.shape[1]:
        raise ValueError(f"hidden {tuple(hidden_ND.shape)} and weight {tuple(weight_VD.shape)} must be N x D and V x D")
    if labels_N.shape != hidden_ND.shape[:1]:
        raise ValueError(
            f"labels {tuple(labels_N.shape)} must have one entry per row of hidden {tuple(hidden_ND.shape)}"
        )
    if labels_N.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"labels must be int64 or int32, not {labels_N.dtype}")
    if bias_V is not None and bias_V.shape != weight_VD.shape[:1]:
        raise ValueError(f"bias {tuple(bias_V.shape)} must have one entry per row of weight {tuple(weight_VD.shape)}")


def _check_settings(denominator: float, chunk_rows: int | None, tolerance: float, statistics: str) -> None:
    if not 0 < denominator < math.inf:
        raise ValueError(f"denominator must be above 0 and finite, not {denominator}")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, not {chunk_rows}")
    if not 0 <= tolerance < 1:
        raise ConfigError(f"tolerance {tolerance} must be at least 0 and below 1; 0 is exact", param="tolerance")
    if statistics not in ("all", "target"):
        raise ConfigError(f"unknown statistics {statistics!r}: there are all, target", param="statistics")


def _check_references(
    chosen: Objective,
    hidden_ND: Tensor,
    weight_VD: Tensor,
    segments_N: Tensor | None,
    ref_logp_N: Tensor | None,
    ref_hidden_ND: Tensor | None,
    ref_weight_VD: Tensor | None,
) -> None:
    """What the objective needs is there and fits."""
    given = {
        "segments_N": (chosen.needs_segments, segments_N),
        "ref_logp_N": (chosen.needs_ref_logp, ref_logp_N),
        "ref_hidden_ND": (chosen.needs_reference, ref_hidden_ND),
        "ref_weight_VD": (chosen.needs_reference, ref_weight_VD),
    }
    for name, (needed, tensor) in given.items():
        if not needed:
            continue
        if tensor is None:
            raise ConfigError(
                f"objective {chosen.name} needs {name}: give it, or choose another", param="objective.name"
            )
        rows = weight_VD.shape[0] if name == "ref_weight_VD" else hidden_ND.shape[0]
        if tensor.ndim != (1 if name.endswith("_N") else 2) or tensor.shape[0] != rows:
            raise ValueError(f"{name} {tuple(tensor.shape)} must have {rows} entries, as its suffix says")


def _supervised_rows(labels_N: Tensor, vocabulary: int) -> Tensor:
    """Indices of supervised rows; checks their labels in the same wait for the device."""
    rows_M = (labels_N != IGNORED).nonzero().squeeze(1)
    if rows_M.numel():
        low, high = (int(bound) for bound in torch.stack(labels_N[rows_M].aminmax()).tolist())
        if low < 0 or high >= vocabulary:
            wrong = low if low < 0 else high
            raise IndexError(
                f"label {wrong} is outside the vocabulary of {vocabulary}: "
                f"labels are 0..{vocabulary - 1}, or {IGNORED} for rows that are not supervised"
            )
    return rows_M


def _default_chunk_rows(weight_VD: Tensor) -> int:
    elements = _CHUNK_ELEMENTS_CPU if weight_VD.device.type == "cpu" else _CHUNK_ELEMENTS_GPU
    return max(1, elements // weight_VD.shape[0])


def _numbered(segments_M: Tensor) -> Tensor:
    """The same sequences, numbered from 0."""
    return segments_M.unique(return_inverse=True)[1]


def _nothing(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> LossSums:
    # A zero that depends on every input keeps the graph, so that backward() works and reaches all parameters.
    parts = [hidden_ND, weight_VD] + ([bias_V] if bias_V is not None else [])
    zero = sum((part[:0].sum(dtype=torch.float32) for part in parts), hidden_ND.new_zeros((), dtype=torch.float32))
    none_M = hidden_ND.new_zeros(0, dtype=torch.float32)
    return LossSums(zero, 0, hidden_ND.new_zeros(len(STATISTICS), dtype=torch.float64), zero, none_M, none_M)


def _summarise(results: RowResults, request: Request, eos_token_id: int | None) -> Tensor:
    nll_M = -results.logp_N.double()
    weight_M, p_M = results.weight_N.double(), nll_M.neg().exp()
    kl_M = results.kl_N.double() if results.kl_N is not None else torch.zeros_like(nll_M)
    unknown_M = torch.full_like(nll_M, torch.nan)
    eos_M = request.labels_N == (-1 if eos_token_id is None else eos_token_id)
    columns = (
        weight_M * nll_M + request.objective.kl_weight * kl_M,
        nll_M,
        weight_M,
        weight_M.square(),
        p_M < 0.1,
        p_M > 0.9,
        results.correct_N if results.correct_N is not None else unknown_M,
        results.entropy_N if results.entropy_N is not None else unknown_M,
        nll_M * eos_M,
        eos_M,
        torch.ones_like(nll_M),
        kl_M,
    )
    return torch.stack([column.double() for column in columns]).sum(dim=1)


class _Head(torch.autograd.Function):
    """The loss of gathered rows, times request.scale.

    The loss is linear in the scalar gradient that arrives in backward, so the gradients for a scalar of one are taken
    in forward and scaled in backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        request: Request,
        held: list[RowResults],
        differentiate: bool,
    ) -> Tensor:
        needs = tuple(differentiate and need for need in ctx.needs_input_grad[:3])
        with torch.autocast(hidden_ND.device.type, enabled=False):
            results, gradients = compute(Projection(hidden_ND, weight_VD, bias_V), bias_V, request, needs)
        held.append(results)
        ctx.gradients = (gradients.hidden_ND, gradients.weight_VD, gradients.bias_V)
        ctx.dtypes = (hidden_ND.dtype, weight_VD.dtype, bias_V.dtype if bias_V is not None else None)
        loss_N = results.weight_N.double() * -results.logp_N.double()
        if results.kl_N is not None:
            loss_N += request.objective.kl_weight * results.kl_N.double()
        return loss_N.sum().mul(request.scale).to(results.logp_N.dtype)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("objective_loss has no second derivative: take gradients without create_graph")
        if ctx.gradients is None:
            raise RuntimeError("objective_loss keeps its gradients for one backward pass: call it again for another")
        (scale,) = grad_outputs
        # Where looking costs nothing, a scale of one saves the pass. In place: a second V x D tensor would be the
        # largest of the step.
        if not (scale.is_cpu and scale == 1):
            for gradient in ctx.gradients:
                if gradient is not None:
                    gradient.mul_(scale)
        scaled = tuple(
            gradient.to(dtype) if gradient is not None else None
            for gradient, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        )
        ctx.gradients = None
        return *scaled, None, None, None
