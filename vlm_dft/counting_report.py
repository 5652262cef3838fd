"""What a count of text tokens is asked and what it answers. Torch-free; ``vlm_dft.counting`` counts."""

from __future__ import annotations

from pathlib import Path

from vlm_dft.frozen import Frozen


class CountingConfig(Frozen):
    """What to count, with which tokenizer."""

    model: str
    revision: str | None = None
    dataset: Path


class CountingReport(Frozen):
    """Per row, in the dataset's order; null for a row that the model's chat template refuses."""

    text_tokens: tuple[int | None, ...]
    supervised_tokens: tuple[int | None, ...]
    refused: tuple[str, ...]
    """Rows and reasons, the first ones."""
