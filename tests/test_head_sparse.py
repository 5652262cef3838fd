"""Column-sparse gradients: as exact as promised, and exact where they could not be.

Full size is checked by ``python -m benchmarks head``; the fixture is the same, smaller.

Shapes: N rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from benchmarks.fixtures import HeadInputs, head_inputs, target_probabilities
from vlm_dft.head import LossSums, objective_loss
from vlm_dft.heads import sparse
from vlm_dft.heads.projection import Projection

N, D, V = 96, 256, 16_384
TOLERANCE = 1e-6


@functools.cache
def peaked() -> HeadInputs:
    return head_inputs("peaked", rows=N, hidden=D, vocabulary=V, seed=1)


def run(inputs: HeadInputs, dtype: torch.dtype = torch.float32, **settings) -> tuple[LossSums, list[Tensor]]:
    """Sums and gradients; settings as objective_loss has them, bias_V and frozen among them."""
    hidden_ND = inputs.hidden_ND.to(dtype, copy=True).requires_grad_()
    weight_VD = inputs.weight_VD.to(dtype, copy=True).requires_grad_(not settings.pop("frozen", False))
    bias_V = settings.pop("bias_V", None)
    bias_V = bias_V.to(dtype, copy=True).requires_grad_() if bias_V is not None else None
    settings = {"tolerance": TOLERANCE, "chunk_rows": 32} | settings
    sums = objective_loss(hidden_ND, weight_VD, inputs.labels_N, bias_V=bias_V, **settings)
    leaves = [leaf for leaf in (hidden_ND, weight_VD, bias_V) if leaf is not None and leaf.requires_grad]
    return sums, list(torch.autograd.grad(sums.loss_sum, leaves))


@functools.cache
def exact(inputs: HeadInputs, dtype: torch.dtype = torch.float32, **settings) -> tuple[float, list[Tensor]]:
    """Float64 all the way, of inputs rounded to dtype; that this path is the definition is tested elsewhere."""
    rounded = HeadInputs(inputs.hidden_ND.to(dtype), inputs.weight_VD.to(dtype), inputs.labels_N)
    sums, gradients = run(rounded, torch.float64, **(settings | {"tolerance": 0.0}))
    return sums.loss_sum.item(), gradients


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def test_the_fixture_is_as_peaked_as_it_says():
    p_N = target_probabilities(peaked())
    assert 0.55 <= (p_N > 0.9).float().mean() <= 0.75
    assert 0.10 <= (p_N < 0.1).float().mean() <= 0.20


def test_sparse_gradients_are_within_the_promised_errors():
    sums, (hidden, weight) = run(peaked())
    loss, (hidden_64, weight_64) = exact(peaked())
    assert sums.sparse_tokens == N
    assert sums.loss_sum.item() == pytest.approx(loss, rel=2e-6)
    assert relative(hidden, hidden_64) <= 2e-3
    assert relative(weight, weight_64) <= 3e-4


@pytest.mark.parametrize("rows", [1, 4, 9])
def test_a_few_poor_rows_are_as_exact_though_their_whole_gradient_is_below_the_tolerance(rows: int):
    generator = torch.Generator().manual_seed(0)
    hidden_ND, weight_VD = 0.6 * torch.randn(rows, 64, generator=generator), torch.randn(V, 64, generator=generator)
    poor = HeadInputs(hidden_ND, weight_VD, (hidden_ND @ weight_VD.T).topk(5000).indices[:, -1])
    sums, gradients = run(poor)
    assert sums.weight_M.max() < 1e-4
    for found, expected in zip(gradients, exact(poor)[1], strict=True):
        assert relative(found, expected) <= 3e-4


def test_a_larger_tolerance_is_less_exact_and_the_loss_stays():
    _, (hidden, weight) = run(peaked())
    sums, (coarse_hidden, coarse_weight) = run(peaked(), tolerance=1e-4)
    loss, (hidden_64, weight_64) = exact(peaked())
    assert sums.sparse_tokens == N
    assert sums.loss_sum.item() == pytest.approx(loss, rel=2e-6)
    assert relative(coarse_hidden, hidden_64) > 2 * relative(hidden, hidden_64)
    assert relative(coarse_weight, weight_64) > 2 * relative(weight, weight_64)


def test_bfloat16_gradients_are_far_nearer_than_those_of_full_logits():
    inputs = peaked()
    sums, gradients = run(inputs, torch.bfloat16)
    loss, exact_gradients = exact(inputs, torch.bfloat16)
    leaves = [tensor.bfloat16().requires_grad_() for tensor in (inputs.hidden_ND, inputs.weight_VD)]
    nll_N = torch.nn.functional.cross_entropy((leaves[0] @ leaves[1].T).float(), inputs.labels_N, reduction="none")
    full_logits = (nll_N.detach().neg().exp() * nll_N).sum()
    assert sums.loss_sum.item() == pytest.approx(loss, rel=2e-6)
    for found, peer, expected in zip(gradients, torch.autograd.grad(full_logits, leaves), exact_gradients, strict=True):
        assert found.dtype == torch.bfloat16
        assert relative(found, expected) <= 0.4 * relative(peer, expected)


def test_without_the_zero_row_sum_correction_the_hidden_gradient_is_wrong(monkeypatch: pytest.MonkeyPatch):
    expected = exact(peaked())[1][0]
    corrected = relative(run(peaked())[1][0], expected)
    monkeypatch.setattr(Projection, "mean_row", lambda self: torch.zeros(D))
    assert relative(run(peaked())[1][0], expected) > 5 * corrected


def weight_change(tolerance: float, steps: int = 60) -> Tensor:
    """What steps of AdamW do to the head."""
    inputs = peaked()
    weight_VD = inputs.weight_VD.clone().requires_grad_()
    optimizer = torch.optim.AdamW([weight_VD], lr=1e-4, weight_decay=0.0, fused=True)
    for _ in range(steps):
        sums = objective_loss(inputs.hidden_ND, weight_VD, inputs.labels_N, tolerance=tolerance, denominator=N)
        assert sums.sparse_tokens == (N if tolerance else 0)
        optimizer.zero_grad()
        sums.loss.backward()
        optimizer.step()
    return weight_VD.detach() - inputs.weight_VD


def cosine(found: Tensor, expected: Tensor) -> float:
    return torch.nn.functional.cosine_similarity(found.double().flatten(), expected.double().flatten(), dim=0).item()


def test_adam_moves_the_head_as_exact_gradients_would(monkeypatch: pytest.MonkeyPatch):
    assert cosine(weight_change(TOLERANCE), weight_change(0.0)) >= 0.99


def test_without_its_tails_adam_loses_its_direction(monkeypatch: pytest.MonkeyPatch):
    expected = weight_change(0.0, steps=10)
    kept = cosine(weight_change(TOLERANCE, steps=10), expected)
    monkeypatch.setattr(sparse, "_mean_state", lambda tail_C, hidden_CD: torch.zeros(D))
    without_likeness = cosine(weight_change(TOLERANCE, steps=10), expected)
    monkeypatch.setattr(sparse, "_FEWEST_BROAD", 1)
    monkeypatch.setattr(sparse, "_ROWS_PER_BROAD", N)
    without_tails = cosine(weight_change(TOLERANCE, steps=10), expected)
    assert kept > 0.99 > without_tails + 0.1
    assert kept > without_likeness


def test_random_weights_are_left_to_the_dense_path():
    inputs = head_inputs("random", rows=N, hidden=64, vocabulary=4096)
    sums, gradients = run(inputs)
    dense_sums, dense_gradients = run(inputs, tolerance=0.0)
    assert sums.sparse_tokens == 0
    assert torch.equal(sums.statistics_S, dense_sums.statistics_S)
    for found, expected in zip(gradients, dense_gradients, strict=True):
        assert torch.equal(found, expected)


def test_each_chunk_decides_for_itself():
    known, unknown = peaked(), head_inputs("random", rows=32, hidden=D, vocabulary=V)
    mixed = HeadInputs(
        torch.cat([known.hidden_ND, unknown.hidden_ND]),
        known.weight_VD,
        torch.cat([known.labels_N, unknown.labels_N]),
    )
    sums, gradients = run(mixed)
    assert sums.sparse_tokens == N
    for found, expected, most in zip(gradients, exact(mixed)[1], (2e-3, 3e-4), strict=True):
        assert relative(found, expected) <= most


@pytest.mark.parametrize(
    ("objective", "sparse_tokens"), [("nll", 0), ("asft", 0), ("deft", 0), ("dft", N), ("power", N), ("threshold", N)]
)
def test_only_objectives_whose_weight_vanishes_are_ever_sparse(objective: str, sparse_tokens: int):
    inputs = peaked()
    reference = {"ref_hidden_ND": inputs.hidden_ND, "ref_weight_VD": inputs.weight_VD}
    sums, gradients = run(inputs, objective=objective, **reference)
    assert sums.sparse_tokens == sparse_tokens
    _, expected = run(inputs, objective=objective, tolerance=0.0, **reference)
    for found, wanted, most in zip(gradients, expected, (2e-3, 3e-4), strict=True):
        assert relative(found, wanted) <= (most if sparse_tokens else 0)


def test_whole_sequence_weights_are_sparse_on_their_second_pass():
    segments_N = torch.arange(N) // 2
    sums, gradients = run(peaked(), objective="sentence", segments_N=segments_N)
    assert sums.sparse_tokens == N
    for found, expected, most in zip(
        gradients, exact(peaked(), objective="sentence", segments_N=segments_N)[1], (2e-3, 3e-4), strict=True
    ):
        assert relative(found, expected) <= most


def test_a_frozen_head_gets_the_same_hidden_gradient_and_none_of_its_own():
    _, (expected, _) = run(peaked())
    sums, gradients = run(peaked(), frozen=True)
    assert sums.sparse_tokens == N
    assert len(gradients) == 1
    assert torch.equal(gradients[0], expected)


def test_a_bias_gradient_is_exact():
    bias_V = 0.1 * torch.randn(V, generator=torch.Generator().manual_seed(3))
    sums, (hidden, weight, bias) = run(peaked(), bias_V=bias_V)
    loss, (hidden_64, weight_64, bias_64) = exact(peaked(), bias_V=bias_V)
    assert sums.sparse_tokens == N
    assert sums.loss_sum.item() == pytest.approx(loss, rel=2e-6)
    assert relative(hidden, hidden_64) <= 2e-3
    assert relative(weight, weight_64) <= 3e-4
    assert relative(bias, bias_64) <= 1e-5


@pytest.mark.parametrize("chunk_rows", [1, 8, 50, 1000])
def test_chunks_of_any_size_keep_the_promise(chunk_rows: int):
    sums, gradients = run(peaked(), chunk_rows=chunk_rows)
    assert sums.sparse_tokens == N
    for found, expected, most in zip(gradients, exact(peaked())[1], (2e-3, 3e-4), strict=True):
        assert relative(found, expected) <= most


def test_nan_is_passed_on_rather_than_left_out():
    inputs = peaked()
    hidden_ND = inputs.hidden_ND.clone()
    hidden_ND[5, 3] = torch.nan
    sums, (hidden, weight) = run(HeadInputs(hidden_ND, inputs.weight_VD, inputs.labels_N))
    assert torch.isnan(sums.loss_sum)
    assert sums.sparse_tokens == N - 32
    assert torch.isnan(hidden[5]).all()
    assert torch.isnan(weight).all()
