"""What a model directory says about its size, without opening a weight: config.json and the headers of its safetensors.

Torch-free. Knows nothing about memory (``estimate_memory``).
"""

from __future__ import annotations

import json
import re
import struct
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final, Literal

from vlm_dft.errors import ModelError

ModelPart = Literal["vision_tower", "merger", "language_model"]
_DECODER_LINEAR: Final = re.compile(r"layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.weight$")
_VISION_LINEAR: Final = re.compile(
    r"visual\.(blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(gate|up|down)_proj)|merger\.mlp\.[02])\.weight$"
)


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model that can be trained here."""

    is_vision: bool
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    is_tied: bool
    parameters: dict[str, int]
    """By ModelPart."""
    decoder_linears: tuple[tuple[int, int], ...]
    """(out, in) of every linear layer of the decoder that an adapter goes to."""
    vision_linears: tuple[tuple[int, int], ...]
    """The same of the vision tower and the merger."""
    vision_hidden_size: int = 0
    vision_intermediate_size: int = 0
    vision_layers: int = 0

    @property
    def total_parameters(self) -> int:
        return sum(self.parameters.values())


def read_shape(model_dir: Path) -> ModelShape:
    """Of a model directory, or of an adapter's base. Raises ModelError."""
    adapter = model_dir / "adapter_config.json"
    if adapter.is_file() and not (model_dir / "config.json").is_file():
        return read_shape(Path(_json(adapter).get("base_model_name_or_path", "")))
    config = _json(model_dir / "config.json")
    text = config.get("text_config") or config
    vision = config.get("vision_config") or {}
    tensors = _tensors(model_dir)
    parameters: Counter[str] = Counter()
    for name, shape in tensors.items():
        parameters[_part_of(name)] += prod(shape)
    try:
        heads = int(text["num_attention_heads"])
        return ModelShape(
            is_vision=bool(vision),
            hidden_size=text["hidden_size"],
            intermediate_size=text["intermediate_size"],
            num_layers=text["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=text.get("num_key_value_heads") or heads,
            head_dim=text.get("head_dim") or text["hidden_size"] // heads,
            vocab_size=text["vocab_size"],
            is_tied=not any(name.endswith("lm_head.weight") for name in tensors),
            parameters=dict(parameters),
            decoder_linears=tuple(_matching(tensors, _DECODER_LINEAR)),
            vision_linears=tuple(_matching(tensors, _VISION_LINEAR)),
            vision_hidden_size=vision.get("hidden_size", 0),
            vision_intermediate_size=vision.get("intermediate_size", 0),
            vision_layers=vision.get("depth", 0),
        )
    except KeyError as error:
        path = model_dir / "config.json"
        raise ModelError(f"{path} has no {error}: it is no model that can be trained here") from None


def _matching(tensors: dict[str, tuple[int, ...]], wanted: re.Pattern[str]) -> list[tuple[int, int]]:
    return [(shape[0], shape[1]) for name, shape in tensors.items() if wanted.search(name) and len(shape) == 2]


def _part_of(name: str) -> ModelPart:
    if "visual.merger." in name:
        return "merger"
    return "vision_tower" if "visual." in name else "language_model"


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from None


def _tensors(model_dir: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor: a safetensors file begins with the length of a JSON header."""
    found: dict[str, tuple[int, ...]] = {}
    for path in sorted(model_dir.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(length))
        except (OSError, ValueError, struct.error, MemoryError) as error:
            raise ModelError(f"{path} cannot be read: {error}") from None
        found |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    if not found:
        raise ModelError(f"{model_dir} has no safetensors: its size cannot be told")
    return found
