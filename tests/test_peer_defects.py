"""What other trainers of DFT get wrong, by the numbers of our study: each test shows the wrong result, and ours.

D1 and D2: transformers' trainer on Qwen2.5-VL, and what builds on it. D3, D4: an implementation of DFT and ASFT by full
logits. D6: the paper's code on several ranks. D12: an EAFT without its normalisation.

Shapes: N supervised tokens, V vocabulary.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from datasets_for_tests import shapes_dataset, text_row, write_dataset
from gradients_for_tests import config_of, gradient_of, relative
from splits_for_tests import ROWS, Problem, problem_of, split_gradient

import vlm_dft.torchvision_shim  # noqa: F401

# isort: split
import torch
from torch import Tensor

from vlm_dft import objectives
from vlm_dft.config import ObjectiveConfig
from vlm_dft.head import objective_loss
from vlm_dft.objectives import TokenStatistics


@pytest.fixture(scope="module")
def problem(tiny_vlm: Path, tmp_path_factory: pytest.TempPathFactory) -> Problem:
    dataset = tmp_path_factory.mktemp("uneven") / "dataset"
    rows = [text_row(n, f"What is {n} + 1?", "so " * (40 if n == 0 else 1) + str(n + 1)) for n in range(ROWS)]
    return problem_of(tiny_vlm, write_dataset(dataset, rows))


def split(problem: Problem, objective: str, micro_batch_size: int, num_ranks: int = 1) -> dict[str, Tensor]:
    return split_gradient(
        problem, objective, micro_batch_size=micro_batch_size, pack_length=None, num_ranks=num_ranks, order=0
    )


@pytest.mark.parametrize("objective", ["nll", "dft"])
def test_d1_the_gradient_is_a_mean_over_tokens_and_not_over_micro_batch_means(objective: str, problem: Problem):
    whole, alone = split(problem, objective, ROWS), split(problem, objective, 1)
    means: dict[str, Tensor] = {}
    for order in range(ROWS):  # each row as a batch of its own, as a mean over its tokens
        for name, gradient in _of_one_row(problem, objective, order).items():
            means[name] = means.get(name, torch.zeros_like(gradient)) + gradient / ROWS
    assert relative(means, whole) > 0.3
    assert relative(alone, whole) < 1e-5


def _of_one_row(problem: Problem, objective: str, row: int) -> dict[str, Tensor]:
    optimization, ranks = problem.optimization(objective, packing=False)
    model = problem.loaded.model
    model.zero_grad(set_to_none=True)
    (micro_batch,) = problem.steps_of([row])
    ranks.step_tokens = micro_batch.num_tokens
    optimization.gradients([micro_batch])
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_d2_sft_and_dft_differ_in_the_loss_and_in_nothing_else(tiny_vlm: Path, tmp_path: Path):
    dataset = shapes_dataset(tmp_path / "dataset", 6, masked=[1])
    for micro_batch_size in (1, 6):
        settings = {"micro_batch_size": micro_batch_size}
        sft = gradient_of(config_of(tiny_vlm, dataset, "nll", **settings))
        # With every weight at 1, dft is nll: the same gradient, because the same number divides both.
        floor = ObjectiveConfig(name="dft", weight_floor=1.0)
        config = config_of(tiny_vlm, dataset, "dft", **settings).model_copy(update={"objective": floor})
        assert relative(gradient_of(config), sft) < 1e-6


@pytest.mark.parametrize("name", objectives.names())
def test_d3_a_micro_batch_without_supervised_tokens_has_a_gradient_of_zero(name: str):
    hidden_ND, weight_VD = (torch.randn(rows, 8, requires_grad=True) for rows in (5, 30))
    reference = {"ref_hidden_ND": hidden_ND.detach(), "ref_weight_VD": weight_VD.detach()}
    sums = objective_loss(
        hidden_ND,
        weight_VD,
        torch.full((5,), -100),
        objective=name,
        segments_N=torch.zeros(5, dtype=torch.long),
        ref_logp_N=torch.zeros(5),
        **reference,
    )
    sums.loss.backward()
    assert sums.num_tokens == 0
    assert hidden_ND.grad is not None
    assert weight_VD.grad is not None
    assert hidden_ND.grad.abs().sum() + weight_VD.grad.abs().sum() == 0


def test_d4_the_gradient_of_asft_is_not_multiplied_by_accumulation(problem: Problem):
    accumulated, whole = split(problem, "asft", 1), split(problem, "asft", ROWS)
    norms = [torch.cat([g.flatten() for g in gradient.values()]).norm().item() for gradient in (accumulated, whole)]
    assert norms[0] / norms[1] == pytest.approx(1.0, rel=1e-4)
    assert relative(accumulated, whole) < 1e-5


def test_d6_dft_on_several_ranks_is_dft_and_not_plain_nll(problem: Problem):
    alone, over_ranks = split(problem, "dft", 2), split(problem, "dft", 2, num_ranks=3)
    assert relative(over_ranks, alone) < 1e-5
    assert relative(split(problem, "nll", 2, num_ranks=3), alone) > 1


def test_d12_the_weights_of_eaft_are_shares_of_the_largest_entropy():
    flat_N = torch.full((3,), math.log(objectives.TOP_K))
    sharp_N = torch.tensor([0.0, 0.5, 1.0])
    for alpha in (0.5, 1.0, 2.0):
        eaft = objectives.objective("eaft", alpha=alpha)
        assert eaft.weights(TokenStatistics(logp_N=flat_N, top_entropy_N=flat_N)).tolist() == pytest.approx([1.0] * 3)
        weights = eaft.weights(TokenStatistics(logp_N=sharp_N, top_entropy_N=sharp_N)).tolist()
        assert weights == pytest.approx([(h / math.log(20)) ** alpha for h in (0.0, 0.5, 1.0)])
    # Without the division by ln 20 a flat prediction would weigh 3.
    assert math.log(objectives.TOP_K) == pytest.approx(2.9957, abs=1e-4)
    # And a batch without supervised tokens gives no NaN (the mean of nothing).
    sums = objective_loss(torch.randn(2, 4), torch.randn(25, 4), torch.full((2,), -100), objective="eaft")
    assert sums.loss.item() == 0
    assert not sums.statistics_S.isnan().any()
