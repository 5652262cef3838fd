"""The demo's base model: a random Qwen2.5-VL with dimensions that learn the demo's problems in minutes on two cores."""

from __future__ import annotations

from pathlib import Path

from vlm_dft.demo.write import texts_to_tokenize
from vlm_dft.tiny import build_tiny_vlm

NAME = "tiny-qwen2.5-vl"
DIMS = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 4,
    "vocab_size": 1024,
    "initializer_range": 0.12,
    "vision_hidden_size": 48,
    "vision_intermediate_size": 96,
    "vision_layers": 2,
    "vision_heads": 4,
}
"""initializer_range is near 1 / sqrt(hidden_size): from 0.02, made for thousands, so small a model learns late."""


def build_base(out: Path, *, seed: int) -> Path:
    """Write the random model with its tokenizer and processor to the directory out."""
    return build_tiny_vlm(out, texts=texts_to_tokenize(500, seed), seed=seed, **DIMS)
