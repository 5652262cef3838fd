"""Backends, settings and what a call may leave out.

Shapes: N rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vlm_dft.errors import ConfigError
from vlm_dft.head import objective_loss
from vlm_dft.heads.gradients import zeros

N, D, V = 19, 8, 53

needs_linear_cross_entropy = pytest.mark.skipif(
    not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="torch has no chunked linear_cross_entropy yet"
)


def problem(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight_VD = torch.randn(V, D, generator=generator)
    labels_N = torch.randint(0, V, (N,), generator=generator)
    hidden_ND = torch.randn(N, D, generator=generator) + weight_VD[labels_N]
    labels_N[::4] = -100
    return hidden_ND.to(dtype).requires_grad_(), weight_VD.to(dtype).requires_grad_(), labels_N


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@needs_linear_cross_entropy
@pytest.mark.parametrize("objective", ["nll", "dft", "eaft", "deft", "geometric_mean", "iw_sft", "psft"])
def test_torchs_own_kernel_gives_the_same_loss_and_gradients(objective: str):
    inputs = problem()
    bias_V = torch.linspace(-1, 1, V).requires_grad_()
    extras = {"segments_N": torch.arange(N) // 5, "ref_logp_N": torch.full((N,), -0.7)}
    both = [
        objective_loss(
            *inputs, objective=objective, bias_V=bias_V, backend=backend, denominator=7.0, tolerance=1e-9, **extras
        )
        for backend in ("torch", "linear_cross_entropy")
    ]
    assert both[1].loss.item() == pytest.approx(both[0].loss.item(), rel=1e-6)
    assert torch.allclose(both[0].statistics_S, both[1].statistics_S, rtol=1e-5)
    leaves = (*inputs[:2], bias_V)
    for expected, found in zip(*(torch.autograd.grad(sums.loss, leaves) for sums in both), strict=True):
        assert relative(found, expected) < 1e-5


@needs_linear_cross_entropy
@pytest.mark.parametrize(
    ("objective", "dtype", "reason"),
    [
        ("asft", torch.float32, "reference model's distribution that asft needs"),
        ("nll", torch.bfloat16, r"narrower than float32.*they are torch\.bfloat16"),
    ],
)
def test_torchs_own_kernel_refuses_what_it_cannot_serve(objective: str, dtype: torch.dtype, reason: str):
    hidden_ND, weight_VD, labels_N = problem(dtype)
    given = {"objective": objective, "ref_hidden_ND": hidden_ND, "ref_weight_VD": weight_VD}
    for labels in (labels_N, torch.full_like(labels_N, -100)):  # in a step that happens to have nothing, too
        with pytest.raises(ConfigError, match=f"backend linear_cross_entropy cannot serve: .*{reason}") as caught:
            objective_loss(hidden_ND, weight_VD, labels, backend="linear_cross_entropy", **given)
        assert caught.value.param == "train.head_backend"


def test_torchs_own_kernel_needs_a_torch_that_has_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(torch.nn, "LinearCrossEntropyOptions", raising=False)
    with pytest.raises(ConfigError, match=r"needs torch 2\.13 or newer"):
        objective_loss(*problem(), backend="linear_cross_entropy")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"backend": "xla"}, ConfigError, "unknown backend 'xla': there are auto, torch, linear_cross_entropy, triton"),
        ({"tolerance": -1e-6}, ConfigError, "at least 0 and below 1"),
        ({"tolerance": float("nan")}, ConfigError, "at least 0 and below 1"),
        ({"statistics": "most"}, ConfigError, "there are all, target"),
        ({"denominator": 0}, ValueError, "denominator must be above 0"),
        ({"denominator": float("inf")}, ValueError, "denominator must be above 0 and finite"),
        ({"chunk_rows": 0}, ValueError, "chunk_rows must be at least 1"),
    ],
)
def test_impossible_settings_are_refused(settings: dict, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        objective_loss(*problem(), **settings)


def test_a_denominator_divides_loss_and_gradients_once():
    inputs = problem()
    plain, divided = objective_loss(*inputs), objective_loss(*inputs, denominator=8.0)
    assert divided.loss.item() == pytest.approx(plain.loss_sum.item() / 8)
    assert divided.loss_sum.item() == pytest.approx(plain.loss_sum.item())
    assert torch.equal(divided.statistics_S, plain.statistics_S)
    expected = [gradient / 8 for gradient in torch.autograd.grad(plain.loss_sum, inputs[:2])]
    for found in (
        torch.autograd.grad(divided.loss, inputs[:2]),
        torch.autograd.grad(objective_loss(*inputs, denominator=8.0).loss_sum / 8, inputs[:2]),
        torch.autograd.grad(objective_loss(*inputs).loss / 8, inputs[:2]),
    ):
        for gradient, wanted in zip(found, expected, strict=True):
            assert torch.allclose(gradient, wanted, rtol=1e-5, atol=1e-9)


def test_statistics_that_were_left_out_are_unknown_rather_than_zero():
    full, target = objective_loss(*problem()), objective_loss(*problem(), statistics="target")
    assert torch.equal(full.loss_sum, target.loss_sum)
    known = full.named() | {"entropy_sum": pytest.approx(float("nan"), nan_ok=True)}
    known["correct_count"] = pytest.approx(float("nan"), nan_ok=True)
    assert target.named() == known


def test_log_probabilities_and_weights_come_in_the_order_of_the_rows():
    hidden_ND, weight_VD, labels_N = problem()
    sums = objective_loss(hidden_ND, weight_VD, labels_N, chunk_rows=4)
    keep_N = labels_N != -100
    logp_MV = (hidden_ND.double()[keep_N] @ weight_VD.double().T).log_softmax(-1)
    expected_M = logp_MV.gather(1, labels_N[keep_N][:, None]).squeeze(1)
    assert torch.allclose(sums.logp_M.double(), expected_M, atol=1e-5)
    assert torch.allclose(sums.weight_M.double(), expected_M.exp(), atol=1e-6)
    assert not sums.logp_M.requires_grad


class LargestFloat32(TorchDispatchMode):
    """Remembers the largest float32 tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == torch.float32:
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("tolerance", [0.0, 1e-6])
def test_a_narrow_head_is_never_widened_as_a_whole(tolerance: float, monkeypatch: pytest.MonkeyPatch):
    from vlm_dft.heads import projection, sparse

    monkeypatch.setattr(projection, "_BLOCK_ELEMENTS", 1000)
    monkeypatch.setattr(sparse, "_BLOCK_ELEMENTS", 1000)
    rows, hidden, vocabulary = 8, 64, 20_000
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(vocabulary, hidden, generator=generator).bfloat16()
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    states = (2 * weight[labels]).requires_grad_()
    with LargestFloat32() as largest:
        objective_loss(states, weight, labels, tolerance=tolerance).loss.backward()
    assert largest.elements < weight.numel()
    assert states.grad is not None


def test_a_gradient_that_is_gone_leaves_its_memory_to_the_next_and_one_that_is_held_keeps_it():
    shape = (1024, 2048)
    held = zeros(shape, torch.float32, "cpu", again=True)
    held.fill_(1)
    other = zeros(shape, torch.float32, "cpu", again=True)
    assert other.data_ptr() != held.data_ptr()
    assert held.min() == 1
    place, row = other.data_ptr(), other[5]
    other.fill_(2)
    del other
    assert zeros(shape, torch.float32, "cpu", again=True).data_ptr() != place  # a view is a holder, too
    assert row.min() == 2
    first = zeros(shape, torch.float32, "cpu", again=True)
    place = first.fill_(3).data_ptr()
    del first
    again = zeros(shape, torch.float32, "cpu", again=True)
    assert again.data_ptr() == place
    assert again.abs().max() == 0
    assert zeros((2048, 1024), torch.float32, "cpu", again=True).data_ptr() != place
