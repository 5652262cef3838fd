"""What a preflight looks at: one forward pass of a model over a sample of rows. Torch-free.

What it finds is ``vlm_dft.preflight_report``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from vlm_dft.frozen import Frozen
from vlm_dft.pixel_config import PixelConfig


class PreflightSettings(Frozen):
    """How much is looked at, apart so that the API offers the same settings with the same limits."""

    num_rows: int = Field(default=200, ge=1, le=10_000)
    """Rows to look at, chosen by seed; all where there are fewer."""
    max_length_tokens: int = Field(default=4096, ge=8, le=1_000_000)
    """Longer rows are not looked at; the report says how many there are."""
    pixels: PixelConfig = PixelConfig()
    seed: int = Field(default=42, ge=0, le=2**31 - 1)
    """Which rows are chosen."""


class PreflightConfig(PreflightSettings):
    """Say which objective suits a model and a dataset, without training."""

    model: str
    """Directory of the base model, or a hub id on the allow-list."""
    revision: str | None = None
    """Commit of a hub model."""
    dataset: Path
    """Canonical dataset directory, as validation wrote it."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 on a GPU that has it, fp32 elsewhere."""
