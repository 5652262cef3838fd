"""How large an image becomes and how many visual tokens it costs. Torch-free, exact, from width and height alone.

The rule is Qwen2.5-VL's: both sides a multiple of 28 (14 x 14 patches, merged 2 x 2), the area within the pixel limits,
the aspect ratio kept as nearly as that allows. Training and evaluation resize through qwen_vl_utils, which gives the
same sizes (a test compares them); this module knows nothing about pixels' values.
"""

from __future__ import annotations

import math

from vlm_dft.config import PixelConfig
from vlm_dft.errors import DatasetError

PATCH_SIZE = 14
MERGE_SIZE = 2
"""Patches per side of what becomes one token."""
FACTOR = PATCH_SIZE * MERGE_SIZE
MAX_ASPECT_RATIO = 200
"""The model's own limit: its image processor refuses more."""


def resized_size(width: int, height: int, pixels: PixelConfig) -> tuple[int, int]:
    """(width, height) after resizing. Raises DatasetError for an image that cannot be resized under the limits."""
    if width < 1 or height < 1 or max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise DatasetError(
            f"an image of {width} x {height} pixels is more elongated than {MAX_ASPECT_RATIO} to 1: crop or pad it"
        )
    new_width = max(FACTOR, round(width / FACTOR) * FACTOR)
    new_height = max(FACTOR, round(height / FACTOR) * FACTOR)
    if new_width * new_height > pixels.max_pixels:
        shrink = math.sqrt(width * height / pixels.max_pixels)
        new_width = math.floor(width / shrink / FACTOR) * FACTOR
        new_height = math.floor(height / shrink / FACTOR) * FACTOR
    elif new_width * new_height < pixels.min_pixels:
        grow = math.sqrt(pixels.min_pixels / (width * height))
        new_width = math.ceil(width * grow / FACTOR) * FACTOR
        new_height = math.ceil(height * grow / FACTOR) * FACTOR
    if not new_width or not new_height:
        raise DatasetError(
            f"an image of {width} x {height} pixels has no room under max_pixels {pixels.max_pixels}: "
            "raise max_pixels, or crop the image"
        )
    return new_width, new_height


def patch_grid(width: int, height: int, pixels: PixelConfig) -> tuple[int, int, int]:
    """Frames, rows and columns of patches that an image of this size becomes."""
    new_width, new_height = resized_size(width, height, pixels)
    return 1, new_height // PATCH_SIZE, new_width // PATCH_SIZE


def num_visual_tokens(width: int, height: int, pixels: PixelConfig) -> int:
    """Tokens that an image of this size takes in the sequence, without its start and end marks."""
    new_width, new_height = resized_size(width, height, pixels)
    return (new_width // FACTOR) * (new_height // FACTOR)
