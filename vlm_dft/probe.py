"""How probable the targets of a fixed set of rows are: histograms, for the reasoning and the answer apart.

The same rows at the start, on the way and at the end show what an objective does to which tokens (Figure 2 of
arXiv 2508.05629): dft moves the probable ones up and leaves the improbable ones, nll pulls at all.
Knows nothing about training; measuring changes nothing, random state included.

Shapes: M supervised tokens, 2 x B counts of reasoning and answer in B bins.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import Final, Literal

import vlm_dft.torchvision_shim  # noqa: F401

# isort: split
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vlm_dft.batches import MicroBatch, Plan, Steps
from vlm_dft.forward import Forward
from vlm_dft.head import IGNORED, objective_loss
from vlm_dft.model import LoadedModel
from vlm_dft.optimization import Optimization
from vlm_dft.ranks import Ranks
from vlm_dft.results import Histogram

NUM_BINS: Final = 20
_PARTS: Final = ("reasoning", "answer")


class Probe:
    """Rows of one dataset that are looked at again and again."""

    def __init__(
        self, split: Literal["train", "validation"], steps: Steps, loaded: LoadedModel, num_rows: int, seed: int
    ) -> None:
        """Chooses num_rows of the rows that steps take, or all: by seed, so the same in every attempt and rank."""
        used = tuple(steps.plan.used())
        chosen = Plan(used, min(num_rows, len(used)), seed=seed).batch(0)
        self._split: Literal["train", "validation"] = split
        self._steps = steps.once(sorted(chosen), num_workers=0)  # too few to start processes for
        self._loaded = loaded
        self._num_rows = len(chosen)

    @torch.no_grad()
    def measure(self, optimization: Optimization, ranks: Ranks, step: int) -> list[Histogram]:
        """One histogram of each part, over all ranks; parts without tokens too. Raises NanLossError."""
        self._loaded.model.eval()
        counts_2B = torch.zeros(len(_PARTS), NUM_BINS, dtype=torch.float64, device=self._loaded.device)
        bad: list[str] = []
        for micro_batches in self._steps.read():
            for micro_batch in micro_batches:
                p_M = self._probabilities(optimization.forward, micro_batch)
                if p_M.isnan().any():
                    bad += micro_batch.row_ids
                counts_2B += self._counts(p_M.nan_to_num(), micro_batch)
        if ranks.any(bool(bad)):
            optimization.raise_not_finite("probability of a target is nan", step, bad)
        return [
            Histogram(
                step=step,
                split=self._split,
                part=part,
                counts=tuple(int(count) for count in counts_B),
                num_tokens=int(sum(counts_B)),
                num_rows=self._num_rows,
                time=time.time(),
            )
            for part, counts_B in zip(_PARTS, ranks.sum(counts_2B).tolist(), strict=True)
        ]

    def _probabilities(self, forward: Forward, micro_batch: MicroBatch) -> Tensor:
        labels_N = micro_batch.labels_BT.flatten()
        head = forward.head
        sums = objective_loss(
            forward(micro_batch),
            head.weight,
            labels_N.to(head.weight.device),
            objective="nll",
            bias_V=head.bias,
            statistics="target",
        )
        return sums.logp_M.exp()

    def _counts(self, p_M: Tensor, micro_batch: MicroBatch) -> Tensor:
        bin_M = (p_M * NUM_BINS).long().clamp(max=NUM_BINS - 1)
        is_answer_M = torch.tensor(self._is_answer(micro_batch), dtype=torch.long, device=bin_M.device)
        return (is_answer_M * NUM_BINS + bin_M).bincount(minlength=len(_PARTS) * NUM_BINS).view(len(_PARTS), NUM_BINS)

    def _is_answer(self, micro_batch: MicroBatch) -> list[bool]:
        """Of each supervised token."""
        labels_N = micro_batch.labels_BT.flatten()
        is_label_N = labels_N != IGNORED
        counts = micro_batch.segments_N[is_label_N].bincount(minlength=len(micro_batch.row_ids)).tolist()
        answers = labels_N[is_label_N].split(counts)
        end = self._loaded.end_of_turn_token_id
        return [not inside for ids_M in answers for inside in in_reasoning(ids_M.tolist(), self._loaded.tokenizer, end)]


def in_reasoning(token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, end_of_turn: int) -> list[bool]:
    """Which tokens of assistant turns lie between <think> and </think>, the tags included.

    A turn that never closes its reasoning has no answer. Tokens are looked at as the pieces that the tokenizer keeps,
    in which ASCII stands for itself: a piece that has a part of a tag belongs to it.
    """
    pieces = tokenizer.convert_ids_to_tokens(list(token_ids))
    end = re.escape(str(tokenizer.convert_ids_to_tokens(end_of_turn)))
    spans = [match.span() for match in re.finditer(rf"<think>.*?(?:</think>|(?={end})|$)", "".join(pieces), re.DOTALL)]
    inside, start = [], 0
    for piece in pieces:
        stop = start + len(piece)
        inside.append(any(start < last and first < stop for first, last in spans))
        start = stop
    return inside
