"""Hidden states, lm_head and labels with the logits of a language model, built from a seed.

Random weights make every prediction flat, which no trained model's are, and on which no sparsity can gain. ``peaked``
imitates a model that knows most of what it is trained on: logits with a spread of about 2.5 nats over the vocabulary,
a common mean row and a frequency direction in the head, related words, hidden states that have a cosine of about 0.35
with one another, targets drawn by Zipf's law, and targets whose logit stands out by as much as makes p > 0.9 for 55 to
75 % of the tokens and p < 0.1 for 10 to 20 %. ``flat`` is an early model: targets and four rivals stand out about
alike. ``random`` is an untrained one.
The shares are checked wherever a number is reported. How sparse the logits of real Qwen weights are is not known here.

Shapes: N rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["peaked", "flat", "random"]

_CONTEXT_NATS = 2.0
_COMMON_CONTEXT = 0.5
"""Share of the context's variance that all rows of a batch have in common."""
_WORDS_PER_GROUP = 8


@dataclass(frozen=True)
class HeadInputs:
    """What a loss head is given; every row is supervised."""

    hidden_ND: Tensor
    weight_VD: Tensor
    labels_N: Tensor


def head_inputs(kind: Kind, *, rows: int, hidden: int = 896, vocabulary: int = 151_936, seed: int = 0) -> HeadInputs:
    """The fixture, float32; the same for the same arguments."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if kind == "random":
        labels_N = torch.randint(0, vocabulary, (rows,), generator=generator)
        return HeadInputs(normal(rows, hidden), normal(vocabulary, hidden) / math.sqrt(hidden), labels_N)

    # A word's own direction, shared in part with its group (spellings, inflections).
    own_VD = normal(vocabulary, hidden).mul_(0.8 / math.sqrt(hidden))
    group_V = torch.randint(0, vocabulary // _WORDS_PER_GROUP, (vocabulary,), generator=generator)
    own_VD += normal(vocabulary // _WORDS_PER_GROUP, hidden).mul_(0.6 / math.sqrt(hidden))[group_V]
    by_rank_V = torch.randperm(vocabulary, generator=generator)
    rank_V = torch.empty(vocabulary).index_copy_(0, by_rank_V, torch.arange(vocabulary, dtype=torch.float32))
    frequency_D, mean_D = (direction / direction.norm() for direction in (normal(hidden), normal(hidden)))

    def zipf(*shape: int) -> Tensor:
        rank = torch.exp(torch.rand(*shape, generator=generator) * math.log(vocabulary)).long() - 1
        return by_rank_V[rank.clamp(0, vocabulary - 1)]

    labels_N, rivals_N4 = zipf(rows), zipf(rows, 4)
    target_N, rival_N4 = _strengths(kind, rows, generator)
    context_ND = math.sqrt(1 - _COMMON_CONTEXT) * normal(rows, hidden) + math.sqrt(_COMMON_CONTEXT) * normal(hidden)
    hidden_ND = _CONTEXT_NATS * context_ND + 4.0 * frequency_D + 2.0 * mean_D
    hidden_ND += target_N[:, None] * own_VD[labels_N] + (rival_N4[:, :, None] * own_VD[rivals_N4]).sum(dim=1)
    weight_VD = own_VD.addr_(torch.log(rank_V + 10), frequency_D, alpha=-0.25).add_(mean_D)
    return HeadInputs(hidden_ND, weight_VD, labels_N)


def _strengths(kind: Kind, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """By how many nats a row's target and four rivals stand out."""
    target_N, rival_N4 = torch.randn(rows, generator=generator), torch.randn(rows, 4, generator=generator)
    if kind == "flat":
        return 15 + 2 * target_N, 11 + 2 * rival_N4
    sureness_N = torch.rand(rows, generator=generator)
    known_N, unknown_N = sureness_N < 0.65, sureness_N > 0.92
    strength_N = torch.where(known_N, 25.0, torch.where(unknown_N, 11.0, 20.0))
    rival_N = torch.where(known_N, 11.0, torch.where(unknown_N, 15.0, 13.0))
    return strength_N + 2 * target_N, rival_N[:, None] + 2 * rival_N4


def target_probabilities(inputs: HeadInputs) -> Tensor:
    """p of every target, computed a few rows at a time."""
    parts = []
    for rows in torch.arange(inputs.labels_N.numel()).split(32):
        logp_RV = (inputs.hidden_ND[rows] @ inputs.weight_VD.T).log_softmax(dim=1)
        parts.append(logp_RV.gather(1, inputs.labels_N[rows, None]).squeeze(1))
    return torch.cat(parts).exp()
