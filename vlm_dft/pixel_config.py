"""How large an image may be: names and limits. Torch-free; what follows from them is ``vlm_dft.data.pixels``."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from vlm_dft.frozen import Frozen


class PixelConfig(Frozen):
    """How large an image may be, in pixels after resizing; one visual token covers 28 x 28 of them."""

    min_pixels: int = Field(default=4 * 28 * 28, ge=28 * 28, le=16384 * 28 * 28)
    """Smaller images are enlarged to this many pixels."""
    max_pixels: int = Field(default=1280 * 28 * 28, ge=28 * 28, le=16384 * 28 * 28)
    """Larger images are shrunk to this many pixels, keeping the aspect ratio."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels {self.min_pixels} is larger than max_pixels {self.max_pixels}")
        return self
