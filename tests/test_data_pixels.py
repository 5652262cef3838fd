"""Visual tokens are counted as qwen_vl_utils resizes and as the processor counts."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vlm_dft.torchvision_shim  # noqa: F401

# isort: split
from qwen_vl_utils.vision_process import smart_resize

from vlm_dft.config import PixelConfig
from vlm_dft.data.pixels import FACTOR, num_visual_tokens, resized_size
from vlm_dft.errors import DatasetError

SIDES = st.integers(1, 5000)
UNIT = FACTOR * FACTOR


@settings(max_examples=500, deadline=None)
@given(width=SIDES, height=SIDES, low=st.integers(1, 64), high=st.integers(64, 16384))
def test_sizes_are_those_of_qwen_vl_utils(width: int, height: int, low: int, high: int) -> None:
    pixels = PixelConfig(min_pixels=low * UNIT, max_pixels=high * UNIT)
    try:
        expected = smart_resize(height, width, FACTOR, pixels.min_pixels, pixels.max_pixels)
    except ValueError:
        expected = (0, 0)
    if 0 in expected:  # qwen_vl_utils goes on with an empty image, and fails later
        with pytest.raises(DatasetError):
            resized_size(width, height, pixels)
        return
    assert resized_size(width, height, pixels) == expected[::-1]
    assert num_visual_tokens(width, height, pixels) == expected[0] * expected[1] // UNIT


@settings(max_examples=200, deadline=None)
@given(width=SIDES, height=SIDES)
def test_resizing_a_second_time_changes_nothing(width: int, height: int) -> None:
    """The model's own processor resizes again; it must find nothing to do."""
    pixels = PixelConfig()
    try:
        once = resized_size(width, height, pixels)
    except DatasetError:
        return
    assert resized_size(*once, pixels) == once


def test_an_image_of_224_pixels_has_64_tokens() -> None:
    assert num_visual_tokens(224, 224, PixelConfig()) == 64


def test_an_elongated_image_is_refused_with_its_size() -> None:
    with pytest.raises(DatasetError, match="8041 x 40 pixels is more elongated than 200"):
        resized_size(8041, 40, PixelConfig())
