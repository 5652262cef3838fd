"""From samples to a batch of the model's inputs.

Shape suffixes: B samples of a batch, T tokens padded to the longest, P patches and I images of all samples together.
The model computes its positions from attention_mask, mm_token_type_ids and image_grid_thw, so padding on either side
changes no logits of a real token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from vlm_dft.data.encoding import IGNORED, Sample


def collate(
    samples: Sequence[Sample], pad_token_id: int, side: Literal["left", "right"] = "right"
) -> dict[str, Tensor]:
    """input_ids, labels, attention_mask (and mm_token_type_ids) as B x T; pixel_values P x D, image_grid_thw I x 3.

    side: right for training, left for generation. Keys of vision inputs are absent where nothing in the batch has them.
    Labels are the caller's to shift, and to take out before a forward pass that should not compute the stock loss.
    """
    assert samples, "a batch has at least one sample"

    def padded(tensors_T: list[Tensor], value: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(tensors_T, batch_first=True, padding_value=value, padding_side=side)

    batch = {
        "input_ids": padded([sample.input_ids_T for sample in samples], pad_token_id),
        "labels": padded([sample.labels_T for sample in samples], IGNORED),
        "attention_mask": padded([torch.ones_like(sample.input_ids_T) for sample in samples], 0),
    }
    types_T = [sample.mm_token_type_ids_T for sample in samples if sample.mm_token_type_ids_T is not None]
    pixels_PD = [sample.pixel_values for sample in samples if sample.pixel_values is not None]
    grids_I3 = [sample.image_grid_thw for sample in samples if sample.image_grid_thw is not None]
    if types_T:
        assert len(types_T) == len(samples), "one encoder made all samples"
        batch["mm_token_type_ids"] = padded(types_T, 0)
    if pixels_PD:
        batch["pixel_values"] = torch.cat(pixels_PD)
        batch["image_grid_thw"] = torch.cat(grids_I3)
    return batch
