"""The softmax of one chunk of rows over the whole vocabulary, and what can be told of it while it is at hand.

Knows nothing about objectives, gradients or where logits come from.

Shapes: C rows of a chunk, R of them at a time, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlm_dft.objectives import TOP_K

# Elements that are worked on at a time: a few rows, so that a CPU's caches hold them between two passes.
_SCRATCH_ELEMENTS_CPU = 2**19
_SCRATCH_ELEMENTS_GPU = 2**27


@dataclass(frozen=True)
class Tile:
    """Softmax of C rows: ``exp_CV / sum_C``. The statistics that were not wanted are missing."""

    exp_CV: Tensor
    """The exponentials in a scale of each row's own, where the logits were."""
    sum_C: Tensor
    statistics: dict[str, Tensor]
    """By name, each of C: logp; where wanted entropy_N, correct, top_entropy_N, sum_p2_N, kl."""
    reference_CV: Tensor | None = None
    """Softmax of the reference, where its logits were."""


def softmax(logits_CV: Tensor, labels_C: Tensor, wanted: frozenset[str], reference_CV: Tensor | None = None) -> Tile:
    """Turn logits, and those of a reference, into their softmax in place.

    wanted: names of statistics beside logp. "correct": the target's logit is the largest, a tie counts.
    """
    elements = _SCRATCH_ELEMENTS_CPU if logits_CV.device.type == "cpu" else _SCRATCH_ELEMENTS_GPU
    step = max(1, elements // logits_CV.shape[1])
    # One buffer for all: a new one each time, between what is kept, would be new memory each time.
    scratch_RV = torch.empty_like(logits_CV[:step])
    parts: list[dict[str, Tensor]] = []
    for start in range(0, labels_C.numel(), step):
        rows = slice(start, start + step)
        reference_RV = reference_CV[rows] if reference_CV is not None else None
        scratch = scratch_RV[: labels_C[rows].numel()]
        parts.append(_softmax_rows(logits_CV[rows], labels_C[rows], wanted, reference_RV, scratch))
    statistics = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return Tile(logits_CV, statistics.pop("sum"), statistics, reference_CV)


def _softmax_rows(
    logits_RV: Tensor, labels_R: Tensor, wanted: frozenset[str], reference_RV: Tensor | None, exp_RV: Tensor
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    largest_R = logits_RV.amax(dim=1)
    target_R = logits_RV.gather(1, labels_R.unsqueeze(1)).squeeze(1)
    if "correct" in wanted:
        found["correct"] = target_R >= largest_R
    if "top_entropy_N" in wanted:
        found["top_entropy_N"] = _entropy(logits_RV.topk(min(TOP_K, logits_RV.shape[1]), dim=1).values)
    # torch's softmax is the fastest way to the exponentials, but its sum is 1e-4 off over a large vocabulary: sum and
    # scale are taken anew. The largest entry, e^0 in the same scale, is never small.
    torch.softmax(logits_RV, dim=1, out=exp_RV)
    found["sum"] = exp_RV.sum(dim=1)
    log_sum_R = (found["sum"] / exp_RV.amax(dim=1)).log()  # of logits from which the largest is subtracted
    found["logp"] = target_R - largest_R - log_sum_R
    if "sum_p2_N" in wanted:
        found["sum_p2_N"] = (torch.linalg.vector_norm(exp_RV, dim=1) / found["sum"]).square()
    if reference_RV is not None:
        found["kl"] = _divergence(reference_RV, logits_RV, largest_R + log_sum_R)
    if "entropy_N" in wanted:
        # H = log sum - E[logit]
        found["entropy_N"] = log_sum_R + largest_R - logits_RV.mul_(exp_RV).sum(dim=1) / found["sum"]
    logits_RV.copy_(exp_RV)
    return found


def _entropy(logits_RK: Tensor) -> Tensor:
    logp_RK = logits_RK.log_softmax(dim=1)
    return -(logp_RK.exp() * logp_RK).sum(dim=1)


def _divergence(reference_RV: Tensor, logits_RV: Tensor, log_sum_R: Tensor) -> Tensor:
    """KL(reference || model) of each row; the reference's logits become its softmax."""
    logq_RV = reference_RV.log_softmax(dim=1)
    torch.exp(logq_RV, out=reference_RV)
    logq_RV -= logits_RV
    return logq_RV.mul_(reference_RV).sum(dim=1) + log_sum_R
