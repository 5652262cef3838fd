"""What a vision model takes of its pictures, made on its device from what the loader has sent.

The loader sends pixel_values as they are, patches of 8-bit numbers in their place (``vlm_dft.data.patch_cache``), or a
frozen tower's features (``vlm_dft.vision_cache``). Inputs without pictures pass unchanged.
"""

from __future__ import annotations

import inspect
from functools import cached_property
from typing import Any

import vlm_dft.torchvision_shim  # noqa: F401

# isort: split
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlm_dft.data.patch_cache import Normalisation

_FEATURES = "mm_encoder_outputs"


class VisionInputs:
    """For the model that a processor belongs to; a text model's tokenizer will do too."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __call__(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """inputs, on the device: what the model's forward takes."""
        pixel_values: Tensor | None = inputs.get("pixel_values")
        if pixel_values is not None and pixel_values.dtype == torch.uint8:
            inputs = inputs | {"pixel_values": self._normalise(pixel_values)}
        if "image_features" in inputs:
            parts: Any = (inputs["image_features"],)  # of all pictures in one
            outputs = {"image": BaseModelOutputWithPooling(pooler_output=parts)}
            inputs = {name: value for name, value in inputs.items() if name != "image_features"} | {_FEATURES: outputs}
        return inputs

    @cached_property
    def _normalise(self) -> Normalisation:
        return Normalisation(self._processor.image_processor)


def takes_features(model: PreTrainedModel) -> bool:
    """Whether this transformers hands precomputed features to its language model."""
    return _FEATURES in inspect.signature(type(model).forward).parameters
