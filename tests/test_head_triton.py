"""The head's Triton backend: in Triton's interpreter on a CPU, and on CUDA tensors where there are any.

    pip install triton && pytest tests/test_head_triton.py

Triton is no dependency of development (200 MB): without it the comparisons are skipped, with the reason.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton_comparison import CASES, Case, errors

from vlm_dft.errors import ConfigError
from vlm_dft.head import objective_loss

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed: pip install triton && pytest tests/test_head_triton.py",
)


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    """Every case's differences from the torch backend, from a process with TRITON_INTERPRET=1."""
    script = Path(__file__).with_name("triton_comparison.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_kernels_give_the_torch_backends_loss_statistics_and_gradients(interpreted: dict[str, Any], name: str):
    case = CASES[name]
    # Both backends round gradients to bfloat16 in the end; the kernels, as on a GPU, also those of the logits.
    gradients = 1e-5 if case.dtype == torch.float32 else 1e-2
    found = interpreted[name]
    for figure, error in found.items():
        assert error < (gradients if figure.startswith("grad") else 1e-5), (figure, found)
    assert ("grad weight" in found) == (not case.frozen_weight)
    assert ("grad bias" in found) == case.bias


@needs_triton
def test_kernels_give_a_zero_with_a_graph_for_nothing_and_nan_for_nan(interpreted: dict[str, Any]):
    expected = {"num_tokens": 0, "loss": 0.0, "gradients": 0.0, "loss of nan": "nan"}
    assert interpreted["nothing and nan"] == expected


@needs_triton
def test_kernels_hold_nothing_as_large_as_the_logits(interpreted: dict[str, Any]):
    memory = interpreted["memory"]
    assert memory["largest"] == memory["weight"] < memory["logits"] / 2


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("objective", ["nll", "dft", "power", "eaft"])
def test_kernels_on_cuda_give_the_torch_backends_loss_statistics_and_gradients(objective: str, dtype: torch.dtype):
    found = errors(Case(objective, (700, 2048, 151_936), dtype, bias=True), "cuda")
    exact = 1e-4  # both add 2048 products in float32, each in its own order
    for figure, error in found.items():
        assert error < (2e-2 if figure.startswith("grad") and dtype == torch.bfloat16 else exact), (figure, found)


def call(dtype: torch.dtype = torch.float32, weight_dtype: torch.dtype | None = None, **settings: Any):
    weight_VD = torch.ones(67, 16, dtype=weight_dtype or dtype)
    return objective_loss(torch.ones(5, 16, dtype=dtype), weight_VD, torch.arange(5), backend="triton", **settings)


def refused(reason: str, attempt: Callable[[], object]) -> None:
    with pytest.raises(ConfigError, match=f"head_backend triton cannot serve: .*{reason}.*; or use torch") as caught:
        attempt()
    assert caught.value.param == "train.head_backend"


def test_kernels_without_cuda_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    refused("it needs CUDA and the hidden states are on cpu", call)


def test_kernels_without_triton_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "vlm_dft.heads.triton_kernels", raising=False)
    refused("triton is not installed: pip install triton", call)


def test_an_interpreter_that_was_asked_for_too_late_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    compiled = SimpleNamespace(INTERPRETED=False)
    monkeypatch.setitem(sys.modules, "vlm_dft.heads.triton_kernels", compiled)
    refused("set after triton was imported: set it before the process starts", call)


def test_kernels_refuse_what_they_cannot_serve():
    refused(r"they are torch\.float64 and torch\.float64", lambda: call(torch.float64))
    refused(r"they are torch\.bfloat16 and torch\.float16", lambda: call(torch.bfloat16, torch.float16))
    reference = {"ref_hidden_ND": torch.ones(5, 16), "ref_weight_VD": torch.ones(67, 16)}
    refused("reference model's distribution that asft needs", lambda: call(objective="asft", **reference))
