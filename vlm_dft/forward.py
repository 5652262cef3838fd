"""One pass through a model's body: a micro-batch in, the hidden states of its positions out.

The head is not part of it: logits are made over supervised positions only (``vlm_dft.head``). A model keeps this to
itself: training, its reference and what is measured on the way all pass through here.
Knows nothing about losses, gradients or optimizers.

Shapes: B rows, T tokens, N = B x T positions, D hidden size.
"""

from __future__ import annotations

import vlm_dft.torchvision_shim  # noqa: F401

# isort: split
import torch
from torch import Tensor, nn

from vlm_dft.attention import HALF, pack_arguments, use_packed_attention
from vlm_dft.batches import MicroBatch
from vlm_dft.model import LoadedModel, base_of, language_head, set_use_cache
from vlm_dft.vision_inputs import VisionInputs


class Forward:
    """The body of one model, with its key-value cache off."""

    def __init__(self, loaded: LoadedModel, *, packing: bool) -> None:
        """packing: micro-batches will be packs. Raises ModelError for a model that cannot take them."""
        self._loaded = loaded
        self._vision_inputs = VisionInputs(loaded.processor)
        set_use_cache(loaded.model, False)
        if packing:
            fast = loaded.device.type == "cuda" and loaded.dtype in HALF
            use_packed_attention(base_of(loaded.model), vision=fast)

    @property
    def head(self) -> nn.Linear:
        return language_head(self._loaded.model)

    def __call__(self, micro_batch: MicroBatch) -> Tensor:
        """hidden_ND, in the type of computation; waits for nothing."""
        device, dtype = self._loaded.device, self._loaded.dtype
        inputs = micro_batch.inputs_on(device)
        if micro_batch.segment_lengths is not None:
            inputs |= pack_arguments(micro_batch.segment_lengths, device)
        body = base_of(self._loaded.model).base_model
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            hidden_BTD = body(**self._vision_inputs(inputs), use_cache=False).last_hidden_state
        return hidden_BTD.flatten(0, 1).to(dtype)
