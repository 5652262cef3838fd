"""DFT heads of others, called as they call them: for comparison only.

trl is the installed package. LLaMA-Factory is not installed: its formula, full float32 logits and cross_entropy, is
written out here. Liger's kernels need Triton and a GPU.

Shapes: N rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import vlm_dft.torchvision_shim  # noqa: F401

# isort: split
import torch.nn.functional as F
from torch import Tensor
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from vlm_dft.head import IGNORED

TRL_VOCABULARY_TILE = 32_768
TRL_STATISTICS = ("entropy", "is_top1")
"""What its SFTTrainer asks for beside log-probabilities."""


def trl(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    """Mean DFT loss of all rows given: gathered ones are its GPU path, all of a batch's its CPU path."""
    keep_N = labels_N != IGNORED
    arguments = (1.0, TRL_VOCABULARY_TILE, None, 1.0, TRL_STATISTICS)
    logp_N = ChunkedLogProbFunction.apply(hidden_ND, weight_VD, None, labels_N.clamp(min=0), *arguments)[0]
    logp_N = logp_N.masked_fill(~keep_N, 0)
    return (-logp_N * logp_N.exp().detach()).sum() / keep_N.sum()


def full_logits(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    """Mean DFT loss from float32 logits of all rows given."""
    logits_NV = F.linear(hidden_ND, weight_VD).float()
    nll_N = F.cross_entropy(logits_NV, labels_N, ignore_index=IGNORED, reduction="none")
    nll_N = nll_N[labels_N != IGNORED]
    return (nll_N * nll_N.detach().neg().exp()).mean()
