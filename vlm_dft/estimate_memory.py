"""How much memory of one device a training takes at its largest micro-batch: arithmetic over a model's shape.

What PyTorch keeps for the backward pass of transformers' own layers was counted tensor by tensor and compared with
measured peaks: benchmarks/calibration/README.md has the errors. Not covered: what a device's libraries keep for
themselves beyond a constant, memory that torch's allocator cannot use again because it lies in pieces, and compiled
layers. Torch-free. Knows nothing about data: the caller says how large a micro-batch becomes.

Letters in comments: D hidden size, I intermediate size, Q and K widths of queries and keys, V vocabulary.
"""

from __future__ import annotations

from typing import Final

from vlm_dft.config import FullConfig, LoraConfig, TrainConfig
from vlm_dft.estimate_report import MemoryEstimate
from vlm_dft.model_shape import ModelShape

BASIS: Final = "arithmetic over config.json and the weights' headers"
_GIB: Final = 2**30
_CUDA_BYTES: Final = 0.7 * 2**30
"""Context and workspaces of one process on a GPU; an assumption, not measured here."""
_CHUNK_ELEMENTS: Final = {"cpu": 10 * 2**20, "cuda": 2**27}
_SCRATCH_ELEMENTS: Final = {"cpu": 2**20, "cuda": 2**27}
"""As in vlm_dft.head and heads.tile, which are not torch-free; a test compares them."""
_NF4_BYTES: Final = 0.5 + 1 / 64
"""4 bits, and a byte per block of 64 (double quantization leaves next to nothing beside it)."""
_PATCH_VALUES: Final = 3 * 2 * 14 * 14
_PATCHES_PER_TOKEN: Final = 4


class MemoryReckoning:
    """One model under the settings of one training, on one kind of device."""

    def __init__(self, shape: ModelShape, config: TrainConfig, *, on_gpu: bool) -> None:
        self.shape, self.config = shape, config
        self.device = "cuda" if on_gpu else "cpu"
        self.precision = ("bf16" if on_gpu else "fp32") if config.precision == "auto" else config.precision
        self.bytes = 2 if self.precision == "bf16" else 4
        """Of one number in computation."""
        self.trainable = self._trainable()

    def estimate(self, tokens: int, visual_tokens: int, supervised_tokens: int | None = None) -> MemoryEstimate:
        """tokens: of the largest micro-batch, padding included. supervised_tokens None: all of them may be."""
        supervised = tokens if supervised_tokens is None else supervised_tokens
        parts = {
            "weights": self._weights(),
            "gradients": 4.0 * self.trainable,
            "optimizer": 8.0 * self.trainable,
            "activations": self._activations(tokens),
            "vision": self._vision(visual_tokens),
            "head": self._head(supervised),
            "fixed": _CUDA_BYTES if self.device == "cuda" else 0.0,
        }
        return MemoryEstimate(
            **{f"{name}_gib": number / _GIB for name, number in parts.items()},
            total_gib=sum(parts.values()) / _GIB,
            parameters=self.shape.total_parameters,
            trainable_parameters=self.trainable,
            precision=self.precision,
            largest_micro_batch_tokens=tokens,
            largest_micro_batch_visual_tokens=visual_tokens,
            basis=BASIS,
        )

    def _trainable(self) -> int:
        adapter, shape = self.config.adapter, self.shape
        if isinstance(adapter, LoraConfig):
            linears = shape.decoder_linears + (shape.vision_linears if adapter.targets == "all" else ())
            return sum(adapter.r * (rows + columns) for rows, columns in linears)
        return sum(number for part, number in shape.parameters.items() if not getattr(self.config.freeze, part))

    def _weights(self) -> float:
        """Trainable ones in float32; frozen ones in the type of computation, or in 4 bits."""
        adapter, shape = self.config.adapter, self.shape
        if isinstance(adapter, FullConfig):
            frozen = shape.total_parameters - self.trainable
            # Autocast keeps a copy of trained matrices for the backward pass.
            return (4.0 + (2.0 if self.bytes == 2 else 0.0)) * self.trainable + self.bytes * frozen
        quantized = sum(rows * columns for rows, columns in shape.decoder_linears) if adapter.quantization else 0
        return 4.0 * self.trainable + self.bytes * (shape.total_parameters - quantized) + _NF4_BYTES * quantized

    @property
    def _trains_language(self) -> bool:
        return isinstance(self.config.adapter, LoraConfig) or not self.config.freeze.language_model

    @property
    def _trains_vision(self) -> bool:
        adapter = self.config.adapter
        if isinstance(adapter, LoraConfig):
            return adapter.targets == "all"
        return self.shape.is_vision and not self.config.freeze.vision_tower

    @property
    def _merger_has_graph(self) -> bool:
        return self._trains_vision or (
            self.shape.is_vision and isinstance(self.config.adapter, FullConfig) and not self.config.freeze.merger
        )

    def _activations(self, tokens: int) -> float:
        """Of the language model. A frozen one still carries gradients to a trained vision tower."""
        shape = self.shape
        layer = self._decoder_layer()
        residual = (4 if isinstance(self.config.adapter, FullConfig) else self.bytes) * shape.hidden_size
        # Gradients of a layer's widest tensors, while it is gone through backwards.
        backward = self.bytes * 3 * shape.intermediate_size + 4 * 3 * shape.hidden_size
        if not (self._trains_language or self._merger_has_graph):
            return tokens * (layer + residual)
        if self.config.gradient_checkpointing:
            return tokens * (shape.num_layers * residual + layer + backward)
        return tokens * (shape.num_layers * layer + backward)

    def _decoder_layer(self) -> float:
        """Bytes that one layer keeps of one token."""
        shape = self.shape
        queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        # A norm keeps its float32 input and the normalised value, and its output is the next layer's input.
        norm = (4 + self.bytes + self.bytes) * shape.hidden_size
        repeated = 2 * queries if shape.num_kv_heads != shape.num_heads else 0
        attention = self.bytes * (3 * queries + 2 * keys + repeated)
        feed_forward = self.bytes * 4 * shape.intermediate_size
        return 2 * norm + attention + feed_forward

    def _vision(self, visual_tokens: int) -> float:
        """Pixels in float32, what the tower computes, and its output."""
        if not visual_tokens:
            return 0.0
        shape = self.shape
        patches = _PATCHES_PER_TOKEN * visual_tokens
        width, wide = shape.vision_hidden_size, shape.vision_intermediate_size
        layer = 2 * (4 + 2 * self.bytes) * width + self.bytes * (6 * width + 4 * wide)
        if not self._trains_vision:
            kept = layer  # one layer at a time, and nothing stays
        elif self.config.gradient_checkpointing:
            kept = shape.vision_layers * 4 * width + layer + self.bytes * 3 * wide
        else:
            kept = shape.vision_layers * layer + self.bytes * 3 * wide
        merger = self.bytes * 3 * _PATCHES_PER_TOKEN * width if self._merger_has_graph else 0
        return patches * (4 * _PATCH_VALUES + kept) + visual_tokens * (merger + self.bytes * shape.hidden_size)

    def _head(self, supervised: int) -> float:
        """Logits of a chunk and its exponentials, the hidden states' gradient, and the weight's before it is added."""
        shape = self.shape
        logits = min(supervised * shape.vocab_size, max(_CHUNK_ELEMENTS[self.device], shape.vocab_size))
        scratch = min(logits, max(_SCRATCH_ELEMENTS[self.device], shape.vocab_size))
        states = supervised * shape.hidden_size * (self.bytes + 4)
        trained = isinstance(self.config.adapter, FullConfig) and not self.config.freeze.language_model
        weight = 4.0 * shape.vocab_size * shape.hidden_size if trained else 0.0
        return 4.0 * (logits + scratch) + states + weight
