"""Sums and counts of a step become the numbers that are logged: one division each, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from vlm_dft.head import STATISTICS, objective_loss
from vlm_dft.results import StepMetrics
from vlm_dft.telemetry import StepCounts, step_metrics


def logged(sums: dict[str, float], **settings) -> StepMetrics:
    given = {"step": 7, "epoch": 0.5, "grad_norm": 2.0, "learning_rate": 1e-4, "seconds": 4.0, "waited_seconds": 1.0}
    return step_metrics(StepCounts(sums, 120, 8), device=torch.device("cpu"), **(given | settings))


def test_every_number_of_a_step_by_hand():
    # Four words of probability 1/4, 1/2, 1/8 and 1/8; the third target is the end of a turn.
    logits_V = torch.tensor([0.25, 0.5, 0.125, 0.125], dtype=torch.float64).log()
    hidden_ND, weight_VD = torch.ones(4, 1, dtype=torch.float64), logits_V[:, None]
    found = logged(objective_loss(hidden_ND, weight_VD, torch.tensor([0, 1, 2, 1]), eos_token_id=2).named())
    ln2 = math.log(2)
    expected = {
        "objective_loss": (0.25 * 2 + 0.5 * 1 + 0.125 * 3 + 0.5 * 1) * ln2 / 4,
        "nll": (2 + 1 + 3 + 1) * ln2 / 4,
        "mean_weight": 1.375 / 4,
        "effective_sample_size": 1.375**2 / (4 * (0.0625 + 0.25 + 0.015625 + 0.25)),
        "share_p_below_01": 0.0,
        "share_p_above_09": 0.0,
        "eos_nll": 3 * ln2,
        "entropy": (0.25 * 2 + 0.5 * 1 + 0.25 * 3) * ln2,
        "token_accuracy": 0.5,
        "num_tokens": 4,
        "input_tokens": 120,
        "num_samples": 8,
        "tokens_per_second": 30.0,
        "samples_per_second": 2.0,
        "data_wait_share": 0.25,
        "grad_norm": 2.0,
        "learning_rate": 1e-4,
    }
    assert found.model_dump(include=set(expected)) == pytest.approx(expected)
    assert found.kl is None
    assert found.peak_memory_gib > 0.05


def test_a_step_without_a_supervised_token_has_no_mean_to_give():
    nothing = logged(dict.fromkeys(STATISTICS, 0.0), anchored=True)
    assert (nothing.nll, nothing.effective_sample_size, nothing.kl, nothing.eos_nll) == (0.0, 0.0, 0.0, None)
