"""Load, freeze and adapt the models we train."""

from __future__ import annotations

from pathlib import Path

import vlm_dft.torchvision_shim  # noqa: F401

# isort: split
from transformers import PreTrainedTokenizerBase, Qwen2_5_VLProcessor

Processor = Qwen2_5_VLProcessor | PreTrainedTokenizerBase


def save_processor(processor: Processor, directory: Path) -> None:
    """Write processor (or tokenizer), chat template, and preprocessor_config.json, which older stacks read."""
    processor.save_pretrained(directory)
    if isinstance(processor, Qwen2_5_VLProcessor):
        processor.image_processor.save_pretrained(directory)
