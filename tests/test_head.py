"""The loss head against float64 references: gradients, not only losses.

Shapes: N rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vlm_dft.errors import ConfigError
from vlm_dft.head import objective_loss

N, D, V = 23, 8, 37


def problem(seed: int = 0, dtype: torch.dtype = torch.float64, peaked: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, head and labels; peaked: targets of all probabilities, sure ones among them."""
    generator = torch.Generator().manual_seed(seed)
    weight_VD = torch.randn(V, D, generator=generator, dtype=torch.float64)
    labels_N = torch.randint(0, V, (N,), generator=generator)
    hidden_ND = torch.randn(N, D, generator=generator, dtype=torch.float64)
    if peaked:
        strength_N1 = torch.linspace(-0.5, 2.0, N, dtype=torch.float64)[:, None]
        hidden_ND = hidden_ND + strength_N1 * weight_VD[labels_N]
    labels_N[::4] = -100
    return hidden_ND.to(dtype).requires_grad_(), weight_VD.to(dtype).requires_grad_(), labels_N


def reference_loss(
    hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, floor: float | None, bias_V: Tensor | None = None
) -> Tensor:
    """The definition, with full float64 logits; floor None: nll."""
    keep = labels_N != -100
    logits = hidden_ND.double()[keep] @ weight_VD.double().T
    if bias_V is not None:
        logits = logits + bias_V.double()
    logp = logits.log_softmax(-1).gather(1, labels_N[keep][:, None]).squeeze(1)
    weight = torch.ones_like(logp) if floor is None else logp.detach().exp().clamp(min=floor)
    return (weight * -logp).sum()


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize(
    ("name", "options", "floor"), [("nll", {}, None), ("dft", {}, 0.0), ("dft", {"weight_floor": 0.3}, 0.3)]
)
@pytest.mark.parametrize("chunk_rows", [1, 5, 100])
def test_loss_and_gradients_equal_the_definition(name: str, options: dict, floor: float | None, chunk_rows: int):
    from vlm_dft import objectives

    hidden_ND, weight_VD, labels_N = problem()
    bias_V = torch.randn(V, dtype=torch.float64, requires_grad=True)
    inputs = (hidden_ND, weight_VD, bias_V)
    chosen = objectives.objective(name, **options)
    sums = objective_loss(hidden_ND, weight_VD, labels_N, objective=chosen, bias_V=bias_V, chunk_rows=chunk_rows)
    expected = reference_loss(hidden_ND, weight_VD, labels_N, floor, bias_V)
    assert sums.loss_sum.item() == pytest.approx(expected.item(), rel=1e-12)
    for found, wanted in zip(
        torch.autograd.grad(sums.loss_sum, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        assert relative(found, wanted) < 1e-12


@pytest.mark.parametrize("name", ["nll", "dft"])
def test_float32_gradients_are_close_to_float64(name: str):
    hidden_ND, weight_VD, labels_N = problem(dtype=torch.float32)
    sums = objective_loss(hidden_ND, weight_VD, labels_N, objective=name, chunk_rows=4)
    expected = reference_loss(hidden_ND, weight_VD, labels_N, 0.0 if name == "dft" else None)
    inputs = (hidden_ND, weight_VD)
    assert sums.loss_sum.item() == pytest.approx(expected.item(), rel=2e-6)
    for found, wanted in zip(
        torch.autograd.grad(sums.loss_sum, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        assert found.dtype == torch.float32
        assert relative(found, wanted) < 2e-6


def test_dft_gradient_is_probability_times_nll_gradient():
    hidden_ND, weight_VD, labels_N = problem()
    rows = (labels_N != -100).nonzero().squeeze(1)
    (nll_ND,) = torch.autograd.grad(objective_loss(hidden_ND, weight_VD, labels_N, objective="nll").loss_sum, hidden_ND)
    (dft_ND,) = torch.autograd.grad(objective_loss(hidden_ND, weight_VD, labels_N, objective="dft").loss_sum, hidden_ND)
    logp_NV = (hidden_ND @ weight_VD.T).log_softmax(-1).detach()
    p_N1 = logp_NV[rows].gather(1, labels_N[rows][:, None]).exp()
    assert p_N1.min() < 0.05
    assert p_N1.max() > 0.95
    assert torch.allclose(dft_ND[rows], p_N1 * nll_ND[rows], rtol=1e-10, atol=1e-14)


def two_way(p: float) -> tuple[Tensor, Tensor, Tensor]:
    """One row, two words, a head of one number: the target has probability p, its logit is the hidden state."""
    logit = math.log(p / (1 - p))
    weight = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    return torch.tensor([[logit]], dtype=torch.float64, requires_grad=True), weight, torch.tensor([0])


@pytest.mark.parametrize("p", [0.05, 0.2, 0.5, 0.9])
def test_finite_differences_with_the_weight_held_still_give_the_dft_gradient(p: float):
    hidden, weight, labels = two_way(p)
    (found,) = torch.autograd.grad(objective_loss(hidden, weight, labels, objective="dft").loss_sum, hidden)
    step = 1e-6

    def nll(logit: float) -> float:
        return math.log1p(math.exp(-logit))

    held = p * (nll(hidden.item() + step) - nll(hidden.item() - step)) / (2 * step)
    assert found.item() == pytest.approx(held, rel=1e-7)
    assert found.item() == pytest.approx(-p * (1 - p), rel=1e-12)  # by hand: that of -p


def test_a_missing_stop_gradient_would_have_the_wrong_sign_at_a_rare_token():
    hidden, weight, labels = two_way(0.05)
    (found,) = torch.autograd.grad(objective_loss(hidden, weight, labels, objective="dft").loss_sum, hidden)
    logp = (hidden @ weight.T).log_softmax(-1)[0, 0]
    (leaking,) = torch.autograd.grad(-logp.exp() * logp, hidden)
    assert leaking.item() > 0.09  # would push the rare target further down
    assert found.item() == pytest.approx(-0.0475)  # raises it


def test_statistics_equal_those_of_full_logits():
    hidden_ND, weight_VD, labels_N = problem()
    eos = int(labels_N[1])
    sums = objective_loss(hidden_ND, weight_VD, labels_N, objective="dft", eos_token_id=eos, chunk_rows=3)
    keep = labels_N != -100
    logp_NV = (hidden_ND @ weight_VD.T).log_softmax(-1).detach()[keep]
    target_N = labels_N[keep]
    logp_N = logp_NV.gather(1, target_N[:, None]).squeeze(1)
    p_N = logp_N.exp()
    is_eos = target_N == eos
    assert sums.num_tokens == int(keep.sum())
    assert sums.named() == pytest.approx(
        {
            "objective_sum": (p_N * -logp_N).sum().item(),
            "nll_sum": -logp_N.sum().item(),
            "weight_sum": p_N.sum().item(),
            "weight_sq_sum": p_N.square().sum().item(),
            "p_below_01_count": int((p_N < 0.1).sum()),
            "p_above_09_count": int((p_N > 0.9).sum()),
            "correct_count": int((logp_NV.argmax(-1) == target_N).sum()),
            "entropy_sum": -(logp_NV.exp() * logp_NV).sum().item(),
            "eos_nll_sum": -logp_N[is_eos].sum().item(),
            "eos_count": int(is_eos.sum()),
            "num_tokens": int(keep.sum()),
            "kl_sum": 0.0,
        },
        rel=1e-10,
    )


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), cut=st.integers(1, N - 1), name=st.sampled_from(["nll", "dft"]))
def test_sums_and_gradients_of_two_parts_add_up(seed: int, cut: int, name: str):
    hidden_ND, weight_VD, labels_N = problem(seed)
    whole = objective_loss(hidden_ND, weight_VD, labels_N, objective=name)
    parts = [
        objective_loss(hidden_ND[s], weight_VD, labels_N[s], objective=name) for s in (slice(cut), slice(cut, None))
    ]
    inputs = (hidden_ND, weight_VD)
    added = torch.autograd.grad(parts[0].loss_sum + parts[1].loss_sum, inputs)
    for found, wanted in zip(added, torch.autograd.grad(whole.loss_sum, inputs), strict=True):
        assert relative(found, wanted) < 1e-12
    assert torch.allclose(parts[0].statistics_S + parts[1].statistics_S, whole.statistics_S, rtol=1e-12)


def test_an_all_masked_batch_is_zero_with_a_graph():
    hidden_ND, weight_VD, _ = problem()
    sums = objective_loss(hidden_ND, weight_VD, torch.full((N,), -100))
    assert (sums.loss_sum.item(), sums.num_tokens) == (0.0, 0)
    assert sums.statistics_S.abs().sum() == 0
    sums.loss_sum.backward()
    assert hidden_ND.grad is not None
    assert hidden_ND.grad.abs().sum() == 0
    assert weight_VD.grad is not None
    assert weight_VD.grad.abs().sum() == 0


def test_rows_that_are_not_supervised_get_no_gradient():
    hidden_ND, weight_VD, labels_N = problem()
    (found,) = torch.autograd.grad(objective_loss(hidden_ND, weight_VD, labels_N).loss_sum, hidden_ND)
    assert found[labels_N == -100].abs().sum() == 0
    assert (found[labels_N != -100].abs().sum(dim=1) > 0).all()


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


class Additions(TorchDispatchMode):
    """Remembers the shapes of matrices of V rows that are added to in place: those of the weight gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.add_.Tensor and args[0].shape[:1] == (V,):
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["nll", "dft"])
def test_no_tensor_of_rows_times_vocabulary_is_ever_made(name: str):
    rows, vocabulary = 96, 2048
    hidden = torch.randn(rows, 4, requires_grad=True)
    weight = torch.randn(vocabulary, 4, requires_grad=True)
    labels = torch.randint(0, vocabulary, (rows,))
    with LargestTensor() as largest:
        objective_loss(hidden, weight, labels, objective=name, chunk_rows=8).loss_sum.backward()
    assert largest.elements == 8 * vocabulary


def test_rows_that_are_not_supervised_cost_no_logits():
    hidden, weight = torch.randn(96, 4, requires_grad=True), torch.randn(2048, 4, requires_grad=True)
    labels = torch.full((96,), -100)
    labels[[3, 50, 51, 70, 95]] = 7
    with LargestTensor() as largest:
        objective_loss(hidden, weight, labels).loss_sum.backward()
    assert largest.elements == 5 * 2048


def test_the_default_chunk_is_far_smaller_than_rows_times_vocabulary():
    from vlm_dft.head import _default_chunk_rows

    assert _default_chunk_rows(torch.empty(151_936, 1)) == 69


def test_a_frozen_head_costs_no_weight_gradient():
    hidden_ND, weight_VD, labels_N = problem(dtype=torch.float32)
    with Additions() as additions:
        loss = objective_loss(hidden_ND, weight_VD, labels_N, chunk_rows=10).loss_sum
    assert additions.shapes == [(V, D), (V, D)]
    wanted = torch.autograd.grad(loss, hidden_ND)[0]
    weight_VD.requires_grad_(False)
    with Additions() as additions:
        objective_loss(hidden_ND, weight_VD, labels_N, chunk_rows=2).loss_sum.backward()
    assert weight_VD.grad is None
    assert additions.shapes == []
    assert hidden_ND.grad is not None
    assert relative(hidden_ND.grad, wanted) < 1e-6


def test_without_gradients_nothing_but_the_sums_is_computed():
    hidden_ND, weight_VD, labels_N = problem()
    with torch.no_grad(), Additions() as additions:
        sums = objective_loss(hidden_ND, weight_VD, labels_N, chunk_rows=2)
    assert not sums.loss_sum.requires_grad
    assert sums.loss_sum.item() == pytest.approx(reference_loss(hidden_ND, weight_VD, labels_N, 0.0).item())
    assert additions.shapes == []


def test_bfloat16_inputs_and_autocast_keep_float32_probabilities():
    hidden_ND, weight_VD, labels_N = problem(dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sums = objective_loss(hidden_ND, weight_VD, labels_N)
    assert sums.loss_sum.dtype == torch.float32
    assert sums.loss_sum.item() == pytest.approx(reference_loss(hidden_ND, weight_VD, labels_N, 0.0).item(), rel=1e-5)
    sums.loss_sum.backward()
    assert hidden_ND.grad is not None
    assert hidden_ND.grad.dtype == torch.bfloat16


def test_large_logits_overflow_nothing():
    hidden = torch.tensor([[3000.0], [-3000.0]], requires_grad=True)
    sums = objective_loss(hidden, torch.tensor([[1.0], [0.0]]), torch.tensor([0, 0]), objective="nll")
    assert sums.loss_sum.item() == pytest.approx(3000.0)
    sums.loss_sum.backward()
    assert hidden.grad is not None
    assert hidden.grad.tolist() == [[0.0], [-1.0]]


def test_labels_outside_the_vocabulary_are_named():
    hidden_ND, weight_VD, labels_N = problem()
    labels_N[3] = V
    with pytest.raises(IndexError, match=rf"label {V} is outside the vocabulary of {V}"):
        objective_loss(hidden_ND, weight_VD, labels_N)
    labels_N[3] = -1
    with pytest.raises(IndexError, match="label -1 is outside the vocabulary"):
        objective_loss(hidden_ND, weight_VD, labels_N)


def test_shapes_that_do_not_fit_are_named():
    hidden_ND, weight_VD, labels_N = problem()
    with pytest.raises(ValueError, match=r"hidden \(23, 8\) and weight \(37, 7\)"):
        objective_loss(hidden_ND, weight_VD[:, :7], labels_N)
    with pytest.raises(ValueError, match=r"labels \(22,\) must have one entry per row"):
        objective_loss(hidden_ND, weight_VD, labels_N[:-1])
    with pytest.raises(ValueError, match=r"bias \(36,\)"):
        objective_loss(hidden_ND, weight_VD, labels_N, bias_V=torch.zeros(36))
    with pytest.raises(ValueError, match=r"not torch\.float32"):
        objective_loss(hidden_ND, weight_VD, labels_N.float())
    with pytest.raises(ValueError, match=r"weight must be floating point, not torch\.complex128"):
        objective_loss(hidden_ND, weight_VD.to(torch.complex128), labels_N)


def test_unknown_objectives_are_refused():
    with pytest.raises(ConfigError, match="there are asft, deft, "):
        objective_loss(*problem(), objective="focal")


def test_a_second_derivative_is_refused_rather_than_zero():
    hidden_ND, weight_VD, labels_N = problem()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(objective_loss(hidden_ND, weight_VD, labels_N).loss, hidden_ND, create_graph=True)


def test_a_second_backward_pass_is_refused_rather_than_wrong():
    hidden_ND, weight_VD, labels_N = problem()
    loss = objective_loss(hidden_ND, weight_VD, labels_N).loss_sum
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()
