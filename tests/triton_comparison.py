"""The head's Triton kernels beside its torch backend: relative differences by case, as JSON where this is run.

Run by tests/test_head_triton.py in a process of its own, since TRITON_INTERPRET=1 counts only when triton is imported.

Shapes: N rows, D hidden size, V vocabulary, M supervised rows.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vlm_dft.head import LossSums, objective_loss
from vlm_dft.heads import triton_head


@dataclass(frozen=True)
class Case:
    """One call. No size is a multiple of a tile."""

    objective: str
    sizes_NDV: tuple[int, int, int] = (17, 24, 130)
    dtype: torch.dtype = torch.float32
    bias: bool = False
    frozen_weight: bool = False
    master_weight: bool = False
    """The weight is float32, as one under training, with values that dtype has."""
    settings: dict[str, Any] = field(default_factory=dict)


CASES = {
    "nll": Case("nll"),
    "dft": Case("dft"),
    "dft of one row tile": Case("dft", (5, 16, 67)),
    "dft with bias": Case("dft", bias=True),
    "dft of a frozen weight": Case("dft", frozen_weight=True),
    "dft with the target's statistics": Case("dft", settings={"statistics": "target"}),
    "power": Case("power", (9, 32, 97)),
    "eaft": Case("eaft", (11, 20, 67)),
    "deft": Case("deft"),
    "geometric_mean": Case("geometric_mean"),
    "iw_sft": Case("iw_sft"),
    "nll in bfloat16": Case("nll", dtype=torch.bfloat16),
    "dft in bfloat16": Case("dft", (13, 32, 101), torch.bfloat16, bias=True),
    "dft of bfloat16 rows and a float32 weight": Case("dft", (13, 32, 101), torch.bfloat16, master_weight=True),
    "dft within a tolerance": Case("dft", settings={"tolerance": 1e-9}),
}


def problem(case: Case, device: str) -> tuple[list[Tensor], dict[str, Any]]:
    """Tensors that gradients flow to, and the call's other arguments. Targets are likely, unlikely and between."""
    rows, features, vocabulary = case.sizes_NDV
    generator = torch.Generator().manual_seed(rows)
    weight_VD = torch.randn(vocabulary, features, generator=generator) / math.sqrt(features)
    labels_N = torch.randint(0, vocabulary, (rows,), generator=generator)
    boost_N = math.log(vocabulary) * 2 * torch.rand(rows, 1, generator=generator)
    hidden_ND = torch.randn(rows, features, generator=generator) + boost_N * weight_VD[labels_N]
    labels_N[::4] = -100
    extras = {
        "labels_N": labels_N,
        "segments_N": torch.arange(rows) // 5,
        "ref_logp_N": torch.linspace(-3, -0.1, rows),
    }
    leaves = [tensor.to(device, case.dtype) for tensor in (hidden_ND, weight_VD)]
    if case.master_weight:
        leaves[1] = leaves[1].float()
    for leaf in leaves:
        leaf.requires_grad_()
    if case.bias:
        leaves.append(torch.linspace(-1, 1, vocabulary).to(device).requires_grad_())
    leaves[1].requires_grad_(not case.frozen_weight)
    return leaves, {name: tensor.to(device) for name, tensor in extras.items()} | case.settings


def call(case: Case, backend: str, device: str = "cpu") -> tuple[LossSums, dict[str, Tensor]]:
    """Results, and the gradients that arrive at the leaves, for a scalar gradient of 3 and a denominator of 7."""
    leaves, arguments = problem(case, device)
    hidden_ND, weight_VD, *bias = leaves
    sums = objective_loss(
        hidden_ND, weight_VD, objective=case.objective, backend=backend, denominator=7.0, eos_token_id=3,
        bias_V=bias[0] if bias else None, **arguments,
    )  # fmt: skip
    (3 * sums.loss).backward()
    names = ("hidden", "weight", "bias")
    return sums, {name: leaf.grad for name, leaf in zip(names, leaves, strict=False) if leaf.grad is not None}


def relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm; what both do not know is no difference."""
    found, expected = found.double(), expected.double()
    if not torch.equal(found.isnan(), expected.isnan()):
        return math.inf
    found, expected = found.nan_to_num(), expected.nan_to_num()
    return ((found - expected).norm() / expected.norm()).item()


def errors(case: Case, device: str = "cpu") -> dict[str, float]:
    """Relative differences of loss, statistics, log-probabilities, weights and gradients."""
    expected, expected_gradients = call(case, "torch", device)
    found, found_gradients = call(case, "triton", device)
    again, again_gradients = call(case, "triton", device)
    assert found_gradients.keys() == expected_gradients.keys()
    assert found.num_tokens == expected.num_tokens
    same = [torch.equal(found.loss, again.loss)]
    same += [torch.equal(gradient, again_gradients[name]) for name, gradient in found_gradients.items()]
    pairs = [(a, b) for a, b in zip(found.named().values(), expected.named().values(), strict=True)]
    return {
        "loss": relative(found.loss, expected.loss),
        "statistics": max(0.0 if a == b else relative(torch.tensor(a), torch.tensor(b)) for a, b in pairs),
        "logp": relative(found.logp_M, expected.logp_M),
        "weights": relative(found.weight_M, expected.weight_M),
        "two runs": 0.0 if all(same) else math.inf,
    } | {f"grad {name}": relative(gradient, expected_gradients[name]) for name, gradient in found_gradients.items()}


def of_nothing_and_of_nan() -> dict[str, Any]:
    """What a call without a supervised row gives, and one whose hidden states are NaN."""
    hidden_ND, weight_VD = torch.ones(6, 16, requires_grad=True), torch.ones(67, 16, requires_grad=True)
    nothing = objective_loss(hidden_ND, weight_VD, torch.full((6,), -100), backend="triton")
    nothing.loss.backward()
    assert hidden_ND.grad is not None
    assert weight_VD.grad is not None
    nan = objective_loss(torch.full((6, 16), torch.nan), weight_VD, torch.arange(6), backend="triton")
    return {
        "num_tokens": nothing.num_tokens,
        "loss": nothing.loss.item(),
        "gradients": hidden_ND.grad.abs().sum().item() + weight_VD.grad.abs().sum().item(),
        "loss of nan": str(nan.loss.item()),
    }


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned; not the interpreter's copies, which are bytes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_floating_point():
            self.elements = max(self.elements, result.numel())
        return result


def of_memory() -> dict[str, int]:
    """Elements of the largest tensor of a call with more rows than features, of its weight and of its logits."""
    rows, features, vocabulary = 60, 16, 130
    case = Case("dft", (rows, features, vocabulary))
    with LargestTensor() as largest:
        sums, _ = call(case, "triton")
    return {"largest": largest.elements, "weight": vocabulary * features, "logits": sums.num_tokens * vocabulary}


def shrink_tiles() -> None:
    """Several tiles of rows, words and features, splits of several tiles and several panels for small inputs too."""
    triton_head._TILE_N, triton_head._TILE_V, triton_head._TILE_BYTES = 16, 32, 64
    triton_head._PROGRAMS = 4
    triton_head._PANEL_ELEMENTS = 1


if __name__ == "__main__":
    shrink_tiles()
    report: dict[str, Any] = {name: errors(case) for name, case in CASES.items()}
    print(json.dumps(report | {"nothing and nan": of_nothing_and_of_nan(), "memory": of_memory()}))
