"""The loss head: hidden states, lm_head and labels -> loss sum, token count and statistics, without N x V logits.

Supervised rows are gathered first; a chunk of them at a time meets the whole vocabulary, and its exact gradients are
taken at once, while the chunk's softmax is at hand: nothing is recomputed in the backward pass.
Knows nothing about models, batches or optimizers; sums are returned, the caller divides once by the global count.

Shapes: N rows, D hidden size, V vocabulary, C rows of a chunk, S statistics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlm_dft import objectives
from vlm_dft.objectives import Objective, TokenStatistics

IGNORED: Final = -100
"""The label of a row that is not supervised."""

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
)
"""What the entries of LossSums.statistics_S are: sums and counts over supervised tokens, never means."""

# Elements of one chunk's logits: large enough for an efficient matmul, small beside the model.
_CHUNK_ELEMENTS_CPU: Final = 2**24
_CHUNK_ELEMENTS_GPU: Final = 2**27


@dataclass(frozen=True)
class LossSums:
    """Sums over the supervised rows of one call."""

    loss_sum: Tensor
    """Sum of weight x NLL, 0-d, differentiable; zero with a graph when nothing is supervised."""
    num_tokens: int
    """Supervised rows."""
    statistics_S: Tensor  # noqa: N815
    """float64, detached, in the order of STATISTICS; add them over calls and ranks, divide last."""

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
    chunk_rows: int | None = None,
) -> LossSums:
    """Sum of weight x NLL of ``labels_N`` under ``softmax(hidden_ND @ weight_VD.T + bias_V)``.

    Labels stand beside the row that predicts them (already shifted); -100 marks a row that is not supervised. Softmax
    and statistics are float32 (float64 for float64 inputs), whatever the inputs' type and any autocast. Gradients are
    computed only for inputs that require them. ``chunk_rows`` bounds memory: chunk_rows x V logits exist at once.

    Raises ValueError for shapes that do not fit, IndexError for labels outside the vocabulary, ConfigError for an
    unknown objective.
    """
    _check_shapes(hidden_ND, weight_VD, labels_N, bias_V)
    chosen = objective if isinstance(objective, Objective) else objectives.objective(objective)
    rows_N = _supervised_rows(labels_N, weight_VD.shape[0])
    if rows_N.numel() == 0:
        # A zero that depends on every input keeps the graph, so that backward() works and reaches all parameters.
        parts = [hidden_ND, weight_VD] + ([bias_V] if bias_V is not None else [])
        zero = sum((part[:0].sum(dtype=torch.float32) for part in parts), hidden_ND.new_zeros((), dtype=torch.float32))
        return LossSums(zero, 0, hidden_ND.new_zeros(len(STATISTICS), dtype=torch.float64))
    labels_N = labels_N[rows_N]
    loss_sum, logp_N, weight_N, entropy_N, correct_N = _ChunkedHead.apply(
        hidden_ND[rows_N],
        weight_VD,
        bias_V,
        labels_N,
        chosen,
        chunk_rows or _default_chunk_rows(weight_VD),
        torch.is_grad_enabled(),
    )
    statistics_S = _summarise(logp_N, weight_N, entropy_N, correct_N, labels_N, eos_token_id)
    return LossSums(loss_sum, labels_N.numel(), statistics_S)


def _check_shapes(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, bias_V: Tensor | None) -> None:
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


def _supervised_rows(labels_N: Tensor, vocabulary: int) -> Tensor:
    """Indices of supervised rows; checks their labels in the same wait for the device."""
    rows_N = (labels_N != IGNORED).nonzero().squeeze(1)
    if rows_N.numel():
        low, high = (int(bound) for bound in torch.stack(labels_N[rows_N].aminmax()).tolist())
        if low < 0 or high >= vocabulary:
            wrong = low if low < 0 else high
            raise IndexError(
                f"label {wrong} is outside the vocabulary of {vocabulary}: "
                f"labels are 0..{vocabulary - 1}, or {IGNORED} for rows that are not supervised"
            )
    return rows_N


def _default_chunk_rows(weight_VD: Tensor) -> int:
    elements = _CHUNK_ELEMENTS_CPU if weight_VD.device.type == "cpu" else _CHUNK_ELEMENTS_GPU
    return max(1, elements // weight_VD.shape[0])


def _summarise(
    logp_N: Tensor, weight_N: Tensor, entropy_N: Tensor, correct_N: Tensor, labels_N: Tensor, eos_token_id: int | None
) -> Tensor:
    nll_N = -logp_N.double()
    weight_N, p_N = weight_N.double(), nll_N.neg().exp()
    eos_N = labels_N == (-1 if eos_token_id is None else eos_token_id)
    columns = (
        weight_N * nll_N,
        nll_N,
        weight_N,
        weight_N.square(),
        p_N < 0.1,
        p_N > 0.9,
        correct_N,
        entropy_N,
        nll_N * eos_N,
        eos_N,
        torch.ones_like(nll_N),
    )
    return torch.stack([column.double() for column in columns]).sum(dim=1)


class _ChunkedHead(torch.autograd.Function):
    """Exact loss and gradients of gathered rows, one chunk of rows at a time.

    The loss is linear in the scalar gradient that arrives in backward, so the gradients for a scalar of one are taken
    in forward and scaled in backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        labels_N: Tensor,
        chosen: Objective,
        chunk_rows: int,
        differentiate: bool,
    ) -> tuple[Tensor, ...]:
        with torch.autocast(hidden_ND.device.type, enabled=False):
            work = _Chunks(hidden_ND, weight_VD, bias_V, [differentiate and need for need in ctx.needs_input_grad[:3]])
            for start in range(0, labels_N.numel(), chunk_rows):
                work.add(start, labels_N[start : start + chunk_rows], chosen)
        loss_sum = (work.weight_N.double() * -work.logp_N.double()).sum().to(work.logp_N.dtype)
        ctx.gradients = (work.grad_hidden_ND, work.grad_weight_VD, work.grad_bias_V)
        ctx.dtypes = (hidden_ND.dtype, weight_VD.dtype, bias_V.dtype if bias_V is not None else None)
        tokens = (work.logp_N, work.weight_N, work.entropy_N, work.correct_N)
        ctx.mark_non_differentiable(*tokens)
        return loss_sum, *tokens

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("objective_loss keeps its gradients for one backward pass: call it again for another")
        # Scaled in place: a second V x D tensor would be the largest of the step.
        scaled = tuple(
            gradient.mul_(grad_outputs[0]).to(dtype) if gradient is not None else None
            for gradient, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        )
        ctx.gradients = None
        return *scaled, None, None, None, None


class _Chunks:
    """Results of the chunks so far; buffers of C x V are made once and used again."""

    def __init__(self, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, needs: list[bool]) -> None:
        self.exact = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
        # On a GPU the matmul reads the narrow type and accumulates into float32; CPUs get the wide type.
        self.narrow = hidden_ND.dtype if hidden_ND.is_cuda else self.exact
        self.hidden_ND = hidden_ND.to(self.narrow)
        self.weight_VD = weight_VD.to(self.narrow)
        self.bias_V = bias_V.to(self.exact) if bias_V is not None else None
        rows = hidden_ND.shape[0]
        self.logp_N, self.weight_N, self.entropy_N = (
            torch.empty(rows, dtype=self.exact, device=hidden_ND.device) for _ in range(3)
        )
        self.correct_N = torch.empty(rows, dtype=torch.bool, device=hidden_ND.device)
        need_hidden, need_weight, need_bias = needs
        self.grad_hidden_ND = torch.empty_like(hidden_ND, dtype=self.exact) if need_hidden else None
        self.grad_weight_VD = torch.zeros_like(weight_VD, dtype=self.exact) if need_weight else None
        self.grad_bias_V = torch.zeros_like(self.bias_V) if need_bias and self.bias_V is not None else None

    def add(self, start: int, labels_C: Tensor, chosen: Objective) -> None:
        rows = slice(start, start + labels_C.numel())
        logits_CV = self._matmul(self.hidden_ND[rows], self.weight_VD.T)
        if self.bias_V is not None:
            logits_CV += self.bias_V
        target_C1 = labels_C.long().unsqueeze(1)
        top_C1, top_index_C1 = logits_CV.max(dim=1, keepdim=True)
        logits_CV -= top_C1  # shifted: the largest is 0, no exponential overflows
        shifted_target_C = logits_CV.gather(1, target_C1).squeeze(1)
        exp_CV = logits_CV.exp()
        sum_C = exp_CV.sum(dim=1)
        logp_C = shifted_target_C - sum_C.log()
        # H = log sum - E[shifted]; both sums stay in the exact type.
        entropy_C = sum_C.log() - torch.linalg.vecdot(exp_CV, logits_CV) / sum_C
        weight_C = chosen.weights(TokenStatistics(logp_N=logp_C, entropy_N=entropy_C))
        self.logp_N[rows], self.weight_N[rows], self.entropy_N[rows] = logp_C, weight_C, entropy_C
        self.correct_N[rows] = (top_index_C1 == target_C1).squeeze(1)
        if self.grad_hidden_ND is None and self.grad_weight_VD is None and self.grad_bias_V is None:
            return
        # d(w x NLL)/dlogits = w (softmax - onehot), w being a constant.
        gradient_CV = exp_CV.mul_((weight_C / sum_C).unsqueeze(1))
        gradient_CV.scatter_add_(1, target_C1, -weight_C.unsqueeze(1))
        self._accumulate(rows, gradient_CV)

    def _accumulate(self, rows: slice, gradient_CV: Tensor) -> None:
        if self.grad_bias_V is not None:
            self.grad_bias_V += gradient_CV.sum(dim=0)
        gradient_CV = gradient_CV.to(self.narrow)
        if self.grad_hidden_ND is not None:
            self.grad_hidden_ND[rows] = self._matmul(gradient_CV, self.weight_VD)
        if self.grad_weight_VD is None:
            return
        if self.narrow == self.exact:
            self.grad_weight_VD.addmm_(gradient_CV.T, self.hidden_ND[rows])
        else:
            self.grad_weight_VD += self._matmul(gradient_CV.T, self.hidden_ND[rows])

    def _matmul(self, left: Tensor, right: Tensor) -> Tensor:
        """Product in the exact type, whatever the factors' type."""
        return torch.mm(left, right) if self.narrow == self.exact else torch.mm(left, right, out_dtype=self.exact)
