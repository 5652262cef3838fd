"""How far a loss head's DFT gradients are from the truth: float64 from the logits on, in blocks of the vocabulary.

Not torch's float32 cross_entropy, which is 1e-4 off at a vocabulary of 151,936.

Shapes: N rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.fixtures import HeadInputs

_BLOCK = 4096


@dataclass(frozen=True)
class Errors:
    """Relative errors; those of gradients in the Frobenius norm."""

    loss: float
    hidden: float
    weight: float


@dataclass(frozen=True)
class Truth:
    """The mean DFT loss, its gradients, and the probabilities of the targets."""

    loss: float
    hidden_ND: Tensor
    weight_VD: Tensor
    p_N: Tensor

    def errors(self, loss: float, hidden_ND: Tensor, weight_VD: Tensor) -> Errors:
        """Of a head that was given the same inputs, in any type."""
        return Errors(
            abs(loss - self.loss) / self.loss,
            _distance(hidden_ND, self.hidden_ND),
            _distance(weight_VD, self.weight_VD),
        )


def _distance(found_RD: Tensor, expected_RD: Tensor) -> float:
    wrong = total = 0.0
    for found_BD, expected_BD in zip(found_RD.split(_BLOCK), expected_RD.split(_BLOCK), strict=True):
        wrong += (found_BD - expected_BD).square_().sum().item()
        total += expected_BD.square().sum().item()
    return (wrong / total) ** 0.5


@torch.no_grad()
def truth(inputs: HeadInputs) -> Truth:
    """Float64, of inputs as they are rounded."""
    rows_ND = inputs.hidden_ND.double()
    words = [slice(start, start + _BLOCK) for start in range(0, inputs.weight_VD.shape[0], _BLOCK)]
    logits_NV = torch.cat([rows_ND @ inputs.weight_VD[block].double().T for block in words], dim=1)
    labels_N1 = inputs.labels_N[:, None]
    logp_NV = logits_NV.sub_(logits_NV.logsumexp(dim=1, keepdim=True))
    logp_N1 = logp_NV.gather(1, labels_N1)
    p_N1, count = logp_N1.exp(), labels_N1.numel()
    gradient_NV = logp_NV.exp_().mul_(p_N1 / count).scatter_add_(1, labels_N1, -p_N1 / count)
    hidden_ND = sum(gradient_NV[:, block] @ inputs.weight_VD[block].double() for block in words)
    assert isinstance(hidden_ND, Tensor)
    weight_VD = torch.cat([gradient_NV[:, block].T @ rows_ND for block in words])
    return Truth((p_N1 * -logp_N1).sum().item() / count, hidden_ND, weight_VD, p_N1.squeeze(1))
