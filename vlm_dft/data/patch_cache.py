"""Pictures as patches of 8-bit numbers: decoded and resized once, read from memory-mapped files in later epochs.

A patch holds what the resized picture holds, channel by channel: the second frame that Qwen2.5-VL's processor adds is
the same again, and normalising makes four bytes of one. Both are done where the model runs, by the processor's own
arithmetic, so the numbers are equal bit for bit while an eighth of the bytes is read, sent and kept.

Shapes: P patches, D values of one patch (3 x 14 x 14), F values of it as the model takes it (3 x 2 x 14 x 14).
Knows nothing about batches or models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import vlm_dft.torchvision_shim  # noqa: F401

# isort: split
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlm_dft.config import CacheConfig
from vlm_dft.data.canonical import CanonicalDataset, ImagePart
from vlm_dft.data.encoding import IMAGE_BACKEND, Encoder, Sample
from vlm_dft.data.pixels import FACTOR, MERGE_SIZE, PATCH_SIZE, patch_grid
from vlm_dft.data.tensor_files import TensorFiles
from vlm_dft.errors import ConfigError

_CHANNELS = 3


class PatchCache:
    """The patches of one dataset's pictures, made when first asked for."""

    def __init__(self, config: CacheConfig, encoder: Encoder, dataset: CanonicalDataset) -> None:
        self._encoder = encoder
        self._dataset = dataset
        settings = encoder.pixels.model_dump() | {"what": "patches", "backend": IMAGE_BACKEND}
        self._files = TensorFiles(config, settings, torch.uint8)

    def reserve(self, parts: Iterable[ImagePart]) -> int:
        """Number of pictures still to be decoded. Raises ConfigError when their patches have no room."""
        shapes = {part.sha256: self._shape(part) for part in parts}
        return len(self._files.reserve(shapes, what="the patches", param="patch_cache"))

    def attach(self, sample: Sample) -> Sample:
        """A sample without pixels, with them. Raises DatasetError like Encoder.encode, DiskFullError."""
        if not sample.images:
            return sample
        patches = [self._patches(part, sample.row_id) for part in sample.images]
        return dataclasses.replace(sample, pixel_values=patches[0] if len(patches) == 1 else torch.cat(patches))

    def _patches(self, part: ImagePart, row_id: str) -> Tensor:
        found_PD = self._files.read(part.sha256, self._shape(part))
        if found_PD is not None:
            return found_PD
        made_PD = patches_of(self._encoder.picture(part, self._dataset, row_id))
        self._files.write(part.sha256, made_PD)
        return made_PD

    def _shape(self, part: ImagePart) -> tuple[int, int]:
        _, rows, columns = patch_grid(part.width, part.height, self._encoder.pixels)
        return rows * columns, _CHANNELS * PATCH_SIZE**2


def patches_of(picture: Image.Image) -> Tensor:
    """P x D, uint8: in the processor's order, the 2 x 2 patches that become one token side by side."""
    pixels = np.asarray(picture)
    rows, columns = pixels.shape[0] // FACTOR, pixels.shape[1] // FACTOR
    lines = pixels.reshape(rows, MERGE_SIZE, PATCH_SIZE, columns, MERGE_SIZE, PATCH_SIZE * _CHANNELS)
    # In two moves: whole lines of patches, then channels, are twice as fast as single bytes.
    patches = np.ascontiguousarray(lines.transpose(0, 3, 1, 4, 2, 5))  # row, column, row and column in the token, line
    return (
        torch.from_numpy(patches)
        .view(-1, PATCH_SIZE**2, _CHANNELS)
        .transpose(1, 2)
        .reshape(-1, _CHANNELS * PATCH_SIZE**2)
    )


class Normalisation:
    """What an image processor does to the numbers of a resized picture, for patches on any device."""

    def __init__(self, image_processor: Any) -> None:
        """Raises ConfigError for a processor that does something else."""
        if not (image_processor.do_rescale and image_processor.do_normalize):
            raise ConfigError("the model's image processor does not normalise: leave patch_cache and vision_cache out")
        scale = 1.0 / image_processor.rescale_factor
        self._mean_C = torch.tensor(image_processor.image_mean) * scale
        self._std_C = torch.tensor(image_processor.image_std) * scale
        self._frames = image_processor.temporal_patch_size

    def __call__(self, patches_PD: Tensor) -> Tensor:
        """uint8 patches -> pixel_values P x F, float32."""
        device = patches_PD.device
        mean_C1, std_C1 = (numbers.to(device, non_blocking=True)[:, None] for numbers in (self._mean_C, self._std_C))
        values_PCX = patches_PD.view(len(patches_PD), _CHANNELS, -1).to(torch.float32).sub_(mean_C1).div_(std_C1)
        return values_PCX[:, :, None].expand(-1, -1, self._frames, -1).reshape(len(patches_PD), -1)
