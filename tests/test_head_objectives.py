"""Every objective through the head: gradients against the definition with full logits, and against differences.

Shapes: N rows, M supervised rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from vlm_dft import objectives
from vlm_dft.errors import ConfigError
from vlm_dft.head import LossSums, objective_loss

N, D, V = 21, 6, 41

CASES: list[tuple[str, dict[str, Any]]] = [
    ("nll", {}),
    ("dft", {}),
    ("dft", {"weight_floor": 0.3, "weight_cap": 0.8}),
    ("dft_nll", {"nll_share": 0.25}),
    ("power", {"alpha": 0.5}),
    ("power", {"alpha": 2.0}),
    ("threshold", {"kind": "top_p", "probability": 0.4}),
    ("threshold", {"kind": "bottom_p", "probability": 0.4}),
    ("threshold", {"kind": "top_logp", "probability": 0.4}),
    ("threshold", {"kind": "bottom_logp", "probability": 0.4}),
    ("deft", {}),
    ("deft_cayley", {}),
    ("eaft", {"alpha": 0.7}),
    ("sentence", {}),
    ("geometric_mean", {}),
    ("asft", {"kl_weight": 0.3}),
    ("iw_sft", {"temperature": 1.5, "weight_cap": 3.0}),
    ("iw_sft_token", {}),
    ("psft", {"clip_ratio_high": 0.9}),
]
LOCALLY_CONSTANT = ("nll", "top_logp", "bottom_logp")


@dataclass
class Problem:
    """Four sequences of unequal length, rows in between that are not supervised, a reference model nearby."""

    hidden_ND: Tensor
    weight_VD: Tensor
    bias_V: Tensor
    labels_N: Tensor
    segments_N: Tensor
    ref_hidden_ND: Tensor
    ref_weight_VD: Tensor
    ref_bias_V: Tensor
    ref_logp_N: Tensor

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden_ND, self.weight_VD, self.bias_V

    def extras(self) -> dict[str, Tensor]:
        names = ("segments_N", "ref_logp_N", "ref_hidden_ND", "ref_weight_VD", "ref_bias_V")
        return {name: getattr(self, name) for name in names}

    def loss(self, name: str, options: dict[str, Any], **settings: Any) -> LossSums:
        chosen = objectives.objective(name, **options)
        return objective_loss(
            *self.inputs[:2], self.labels_N, bias_V=self.bias_V, objective=chosen, **self.extras(), **settings
        )


def problem(seed: int = 0) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight_VD, bias_V = normal(V, D), 0.3 * normal(V)
    labels_N = torch.randint(0, V, (N,), generator=generator)
    hidden_ND = 0.7 * normal(N, D) + torch.linspace(-0.3, 1.5, N, dtype=torch.float64)[:, None] * weight_VD[labels_N]
    ref_hidden_ND, ref_weight_VD = hidden_ND + 0.2 * normal(N, D), weight_VD + 0.1 * normal(V, D)
    ref_bias_V = bias_V + 0.1 * normal(V)
    ref_logits_NV = ref_hidden_ND @ ref_weight_VD.T + ref_bias_V
    ref_logp_N = ref_logits_NV.log_softmax(-1).gather(1, labels_N[:, None]).squeeze(1)
    segments_N = torch.tensor([7] * 6 + [3] * 2 + [40] * 8 + [0] * 5)
    labels_N[::5] = -100
    for tensor in (hidden_ND, weight_VD, bias_V):
        tensor.requires_grad_()
    return Problem(
        hidden_ND, weight_VD, bias_V, labels_N, segments_N, ref_hidden_ND, ref_weight_VD, ref_bias_V, ref_logp_N
    )


def definition(p: Problem, name: str, options: dict[str, Any], held: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The loss from full logits, formulas written out once more, and the weights; held: these weights instead."""
    keep = p.labels_N != -100
    target_M1 = p.labels_N[keep][:, None]
    logp_MV = (p.hidden_ND[keep] @ p.weight_VD.T + p.bias_V).log_softmax(-1)
    logp_M = logp_MV.gather(1, target_M1).squeeze(1)
    with torch.no_grad():
        weight_M = _weights(name, options, p, logp_MV, logp_M, keep) if held is None else held
    loss = (weight_M * -logp_M).sum()
    if name == "asft":
        logq_MV = (p.ref_hidden_ND[keep] @ p.ref_weight_VD.T + p.ref_bias_V).log_softmax(-1)
        loss = loss + options["kl_weight"] * (logq_MV.exp() * (logq_MV - logp_MV)).sum()
    return loss, weight_M


def _weights(name: str, options: dict[str, Any], p: Problem, logp_MV: Tensor, logp_M: Tensor, keep: Tensor) -> Tensor:
    p_M, ratio_M = logp_M.exp(), (logp_M - p.ref_logp_N[keep]).exp()
    segments_M = p.segments_N[keep]
    same_MM = (segments_M[:, None] == segments_M[None, :]).double()
    mean_MM = same_MM / same_MM.sum(1, keepdim=True)
    if name == "threshold":
        counts_M = p_M >= 0.4 if options["kind"].startswith("top") else p_M <= 0.4
        return torch.where(counts_M, torch.ones_like(p_M) if options["kind"].endswith("logp") else p_M, 0.0)
    if name == "deft_cayley":
        floor_M = (mean_MM @ p_M) / 2
        return p_M ** (floor_M + (1 - floor_M) * p_M / (2 - p_M))
    if name == "eaft":
        top_M20 = logp_MV.topk(20, dim=1).values.softmax(1)
        return (-(top_M20 * top_M20.log()).sum(1) / math.log(20)) ** options["alpha"]
    if name == "iw_sft":
        return torch.exp(1.5 * (mean_MM @ ratio_M.log())).clamp(0, 3)
    formulas = {
        "nll": lambda: torch.ones_like(p_M),
        "dft": lambda: p_M.clamp(options.get("weight_floor", 0), options.get("weight_cap", 1)),
        "dft_nll": lambda: 0.75 * p_M + 0.25,
        "power": lambda: p_M ** options["alpha"],
        "deft": lambda: p_M ** logp_MV.exp().square().sum(1),
        "sentence": lambda: torch.exp(same_MM @ logp_M),
        "geometric_mean": lambda: torch.exp(mean_MM @ logp_M),
        "asft": lambda: p_M,
        "iw_sft_token": lambda: ratio_M.clamp(0.2, 1.8),
        "psft": lambda: torch.where(ratio_M > 1.9, 0.0, ratio_M),
    }
    return formulas[name]()


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("chunk_rows", [3, 100])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_loss_weights_and_gradients_equal_the_definition(name: str, options: dict[str, Any], chunk_rows: int):
    p = problem()
    sums = p.loss(name, options, chunk_rows=chunk_rows)
    expected, weight_M = definition(p, name, options)
    assert sums.loss_sum.item() == pytest.approx(expected.item(), rel=1e-12)
    assert sums.named()["objective_sum"] == pytest.approx(expected.item(), rel=1e-12)
    assert torch.allclose(sums.weight_M, weight_M, rtol=1e-10)
    found = torch.autograd.grad(sums.loss_sum, p.inputs)
    for gradient, wanted in zip(found, torch.autograd.grad(expected, p.inputs), strict=True):
        assert relative(gradient, wanted) < 1e-11


@pytest.mark.parametrize(("name", "options"), CASES)
def test_differences_agree_with_the_weights_held_still_and_only_then(name: str, options: dict[str, Any]):
    p = problem(seed=1)
    (gradient_ND,) = torch.autograd.grad(p.loss(name, options).loss_sum, p.hidden_ND)
    held_M = definition(p, name, options)[1]
    generator = torch.Generator().manual_seed(2)
    direction_ND = torch.randn(N, D, generator=generator, dtype=torch.float64)
    moved = []
    for step in (1e-6, -1e-6):
        nearby = problem(seed=1)
        with torch.no_grad():
            nearby.hidden_ND += step * direction_ND
            moved.append((definition(nearby, name, options, held_M)[0], nearby.loss(name, options).loss_sum))
    along = (gradient_ND * direction_ND).sum().item()
    still, leaking = ((moved[0][which] - moved[1][which]).item() / 2e-6 for which in (0, 1))
    assert along == pytest.approx(still, rel=1e-6)
    if options.get("kind", name) not in LOCALLY_CONSTANT:
        assert abs(leaking - along) > 0.01 * abs(along), "a missing stop-gradient could not be seen here"


@pytest.mark.parametrize(("name", "options"), CASES)
def test_the_order_of_rows_and_the_names_of_sequences_change_nothing(name: str, options: dict[str, Any]):
    p, shuffled = problem(), problem()
    order_N = torch.randperm(N, generator=torch.Generator().manual_seed(3))
    for field in ("labels_N", "segments_N", "ref_logp_N", "ref_hidden_ND"):
        setattr(shuffled, field, getattr(shuffled, field)[order_N])
    shuffled.hidden_ND = shuffled.hidden_ND.detach()[order_N].requires_grad_()
    shuffled.segments_N = 100 - shuffled.segments_N
    first, second = (q.loss(name, options, chunk_rows=4) for q in (p, shuffled))
    assert first.loss_sum.item() == pytest.approx(second.loss_sum.item(), rel=1e-12)
    found, wanted = (torch.autograd.grad(s.loss_sum, q.inputs) for s, q in ((second, shuffled), (first, p)))
    assert relative(found[0], wanted[0][order_N]) < 1e-12
    assert relative(found[1], wanted[1]) < 1e-12


@pytest.mark.parametrize(("name", "options"), CASES)
def test_whole_sequences_may_be_split_over_calls(name: str, options: dict[str, Any]):
    p = problem()
    whole = p.loss(name, options)
    parts = []
    for keep_N in (p.segments_N == 40, p.segments_N != 40):
        part = problem()
        part.labels_N[~keep_N] = -100
        part.hidden_ND, part.weight_VD, part.bias_V = p.inputs
        parts.append(part.loss(name, options).loss_sum)
    added = torch.autograd.grad(parts[0] + parts[1], p.inputs)
    for found, wanted in zip(added, torch.autograd.grad(whole.loss_sum, p.inputs), strict=True):
        assert relative(found, wanted) < 1e-12


def test_kl_is_counted_and_zero_to_oneself():
    p = problem()
    assert p.loss("asft", {}).named()["kl_sum"] > 0
    p.ref_hidden_ND, p.ref_weight_VD, p.ref_bias_V = (tensor.detach() for tensor in p.inputs)
    assert p.loss("asft", {}).named()["kl_sum"] == pytest.approx(0, abs=1e-12)
    assert p.loss("dft", {}).named()["kl_sum"] == 0


def test_no_gradient_reaches_the_reference():
    p = problem()
    p.ref_hidden_ND.requires_grad_()
    p.ref_weight_VD.requires_grad_()
    p.loss("asft", {}).loss_sum.backward()
    assert p.ref_hidden_ND.grad is None
    assert p.ref_weight_VD.grad is None


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("geometric_mean", "segments_N"),
        ("psft", "ref_logp_N"),
        ("asft", "ref_hidden_ND"),
        ("asft", "ref_weight_VD"),
    ],
)
def test_what_an_objective_needs_and_was_not_given_is_named(name: str, missing: str):
    p = problem()
    extras = p.extras() | {missing: None}
    with pytest.raises(ConfigError, match=f"objective {name} needs {missing}"):
        objective_loss(p.hidden_ND, p.weight_VD, p.labels_N, objective=name, **extras)
    extras[missing] = p.extras()[missing][:-1]
    with pytest.raises(ValueError, match=rf"{missing} \(.*\) must have"):
        objective_loss(p.hidden_ND, p.weight_VD, p.labels_N, objective=name, **extras)


@pytest.mark.parametrize("name", ["sentence", "asft", "eaft", "deft"])
def test_objectives_work_in_bfloat16(name: str):
    p = problem()
    expected = definition(p, name, {"kl_weight": 0.05, "alpha": 1.0})[0].item()
    narrow = p.extras() | {key: p.extras()[key].bfloat16() for key in ("ref_hidden_ND", "ref_weight_VD", "ref_bias_V")}
    hidden_ND, weight_VD, bias_V = (tensor.detach().bfloat16().requires_grad_() for tensor in p.inputs)
    loss = objective_loss(hidden_ND, weight_VD, p.labels_N, objective=name, bias_V=bias_V, **narrow).loss_sum
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=0.05)
    loss.backward()
    assert weight_VD.grad is not None
    assert weight_VD.grad.dtype == torch.bfloat16
