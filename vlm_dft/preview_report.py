"""What a preview is asked and what it shows: rows as the trainer will see them. Torch-free.

How it is made is ``vlm_dft.preview``. Characters are counted in the rendered text; tokens in the sequence that is
trained, in which each picture takes as many places as it has visual tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from pydantic import Field

from vlm_dft.frozen import Frozen
from vlm_dft.pixel_config import PixelConfig

MAX_ROWS: Final = 20


class PreviewSettings(Frozen):
    """Which rows, and under which limits; apart so that the API offers the same settings with the same limits."""

    num_rows: int = Field(default=3, ge=1, le=MAX_ROWS)
    """Rows to show."""
    first_row: int = Field(default=1, ge=1, le=1_000_000_000)
    """1: the dataset's first row."""
    max_length_tokens: int = Field(default=4096, ge=8, le=1_000_000)
    """Longer rows are shown whole, and marked as what does not fit."""
    pixels: PixelConfig = PixelConfig()


class PreviewConfig(PreviewSettings):
    """What the process is told."""

    model: str
    """Model directory, or a hub id."""
    revision: str | None = None
    dataset: Path
    """Canonical dataset directory."""


class TrainedSpan(Frozen):
    """A stretch that the loss is taken of: an assistant turn with its end-of-turn token."""

    start: int
    """First character."""
    end: int
    """The character after the last."""
    token_start: int
    token_end: int


class PreviewImage(Frozen):
    """One picture, and what it becomes."""

    image: str
    """Path in the dataset."""
    width: int
    height: int
    resized_width: int
    resized_height: int
    grid_thw: tuple[int, int, int]
    """Frames, rows and columns of 14 x 14 patches."""
    visual_tokens: int
    start: int
    """First character of its token in the text."""
    end: int
    token_start: int
    token_end: int


class PreviewRow(Frozen):
    """One row as it is trained."""

    row: str
    """file:line of the source."""
    text: str
    """What the chat template makes of it; each picture stands as one image token."""
    trained_spans: tuple[TrainedSpan, ...]
    images: tuple[PreviewImage, ...]
    text_tokens: int
    visual_tokens: int
    total_tokens: int
    supervised_tokens: int
    fits: bool
    """Whether total_tokens is within max_length_tokens. A row that does not fit is never shortened: it fails the job,
    or is left out and counted where on_overlong says so."""
    problem: str | None = None
    """Why the model cannot be trained on the row; its other fields are then empty."""


class PreviewReport(Frozen):
    """The rows that were asked for."""

    rows_total: int
    """Rows of the dataset."""
    max_length_tokens: int
    rows: tuple[PreviewRow, ...]
