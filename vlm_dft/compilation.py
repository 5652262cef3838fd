"""torch.compile for the language model's layers: one compilation serves them all, for any batch and length.

The layers alone, because they are most of the work and have one shape; embedding, vision tower and loss head stay as
they are, and so does everything that saves, exports or adapts the model.
"""

from __future__ import annotations

import os
import shutil
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import vlm_dft.torchvision_shim  # noqa: F401

# isort: split
import torch
from transformers import PreTrainedModel

from vlm_dft.errors import ConfigError

BACKEND: Final = "inductor"


def decoder_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """Those of the language model, in order."""
    body: Any = model.base_model
    return list(getattr(body, "language_model", body).layers)


def compile_layers(model: PreTrainedModel, device: torch.device) -> None:
    """In place; compiled at first use. Raises ConfigError where this machine has no compiler for it."""
    _check_compiler(device)
    for layer in decoder_layers(model):
        layer.compile(backend=BACKEND, dynamic=True)


def as_written(model: PreTrainedModel) -> AbstractContextManager[object]:
    """Within, compiled layers run uncompiled: what generates has shapes of its own, and a layer that was compiled too
    often for others is not compiled again for the training."""
    compiled = any(layer._compiled_call_impl is not None for layer in decoder_layers(model))
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def _check_compiler(device: torch.device) -> None:
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise ConfigError(
                "compile needs triton on a GPU: install it, or set compile to false", param="train.compile"
            )
    elif not any(map(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "clang++")))):
        raise ConfigError(
            "compile needs a C++ compiler on a CPU, and there is none: install g++, or set compile to false",
            param="train.compile",
        )
