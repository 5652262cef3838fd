"""From samples to the model's inputs: as rows padded to the longest (``collate``), or one after another (``pack``).

Shape suffixes: B samples of a batch, T tokens padded to the longest, P patches and I images of all samples together; in
a pack T tokens of all samples. The model computes the positions of padded rows from attention_mask, mm_token_type_ids
and image_grid_thw, so padding on either side changes no logits of a real token; a pack brings its own positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

import torch
from torch import Tensor

from vlm_dft.data.encoding import IGNORED, Sample

MERGE: Final = 2
"""Qwen2.5-VL merges 2 x 2 patches into one token (``vlm_dft.data.pixels.FACTOR`` is 14 pixels times this)."""


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
    if types_T:
        assert len(types_T) == len(samples), "one encoder made all samples"
        batch["mm_token_type_ids"] = padded(types_T, 0)
    return batch | _pictures(samples)


def _pictures(samples: Sequence[Sample]) -> dict[str, Tensor]:
    inputs = {}
    for name in ("pixel_values", "image_features", "image_grid_thw"):
        tensors = [value for sample in samples if (value := getattr(sample, name)) is not None]
        if tensors:
            inputs[name] = torch.cat(tensors)
    return inputs


def pack(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """input_ids, labels as 1 x T, the samples one after another; position_ids, 4 x 1 x T for vision models, else 1 x T.

    Positions begin anew at each sample: the first row counts its tokens, the others are time, height and width. There
    is no attention_mask: whoever runs the model says where samples end (``vlm_dft.attention.pack_arguments``).
    """
    assert samples, "a pack has at least one sample"
    positions = [
        torch.arange(len(sample))[None] if sample.mm_token_type_ids_T is None else positions_4T(sample)
        for sample in samples
    ]
    position_ids_RT = torch.cat(positions, dim=1)
    return {
        "input_ids": torch.cat([sample.input_ids_T for sample in samples])[None],
        "labels": torch.cat([sample.labels_T for sample in samples])[None],
        "position_ids": position_ids_RT if len(position_ids_RT) == 1 else position_ids_RT[:, None],
    } | _pictures(samples)


def positions_4T(sample: Sample) -> Tensor:  # noqa: N802  shapes are suffixes
    """Token count, time, height and width of a vision model's sample, as the model itself would compute them.

    Text counts on in all three; a picture's tokens share the time at which it begins, and count its rows and columns.
    """
    count_T = torch.arange(len(sample))
    assert sample.mm_token_type_ids_T is not None, "made for a vision model"
    parts, at, start = [], 0, 0
    for rows, columns, first in _grids(sample):
        text = first - at
        parts.append(torch.arange(start, start + text).expand(3, -1))
        start += text
        height, width = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        parts.append(start + torch.stack([torch.zeros_like(height), height, width]).flatten(1))
        at, start = first + rows * columns, start + max(rows, columns)
    parts.append(torch.arange(start, start + len(sample) - at).expand(3, -1))
    return torch.cat([count_T[None], torch.cat(parts, dim=1)])


def _grids(sample: Sample) -> list[tuple[int, int, int]]:
    """Rows and columns of tokens, and the place of the first of them, for each picture."""
    assert sample.mm_token_type_ids_T is not None, "made for a vision model"
    if sample.image_grid_thw is None:
        return []
    places = sample.mm_token_type_ids_T.nonzero().flatten().tolist()
    grids, taken = [], 0
    for _, height, width in sample.image_grid_thw.tolist():
        rows, columns = height // MERGE, width // MERGE
        grids.append((rows, columns, places[taken]))
        taken += rows * columns
    assert taken == len(places), "the encoder gives each picture its tokens"
    return grids
