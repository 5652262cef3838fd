"""The numbers of a training: names, limits, defaults; the API offers the same ones. Torch-free."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from vlm_dft.frozen import Frozen

HeadBackend = Literal["auto", "torch", "linear_cross_entropy", "triton"]


class Hyperparameters(Frozen):
    """Every number of a training."""

    learning_rate: float = Field(default=5e-5, gt=0.0, le=1.0)
    """Peak learning rate of AdamW."""
    vision_learning_rate: float | None = Field(default=None, gt=0.0, le=1.0)
    """The same for the vision tower; None: learning_rate. Refused where the tower is frozen."""
    merger_learning_rate: float | None = Field(default=None, gt=0.0, le=1.0)
    """The same for the merger; None: learning_rate. Refused where the merger is frozen."""
    lr_schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: down to zero as a cosine, or constant."""
    warmup_ratio: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of the steps over which the learning rate rises from zero."""
    weight_decay: float = Field(default=0.0, ge=0.0, le=1.0)
    """AdamW's, of matrices; vectors (biases, norms) have none."""
    max_grad_norm: float = Field(default=1.0, gt=0.0, le=1000.0)
    """Gradients with a larger norm are scaled down to it."""
    n_epochs: int = Field(default=1, ge=1, le=1000)
    """How often each row is trained on."""
    max_steps: int | None = Field(default=None, ge=1, le=10_000_000)
    """Stop after this many optimizer steps; n_epochs otherwise decides."""
    batch_size: int = Field(default=16, ge=1, le=65536)
    """Samples per optimizer step, over all devices and accumulation."""
    micro_batch_size: int = Field(default=1, ge=1, le=4096)
    """Samples per forward pass on one device; changes memory and speed, never the gradient. Without packing."""
    packing: bool = False
    """Put a step's samples one after another into packs, without padding; changes memory and speed alone."""
    pack_length_tokens: int | None = Field(default=None, ge=8, le=10_000_000)
    """Most tokens in one pack, which is one forward pass; None: max_length_tokens. No sample may be longer."""
    max_length_tokens: int = Field(default=4096, ge=8, le=1_000_000)
    """Longest sample, text and visual tokens together. Samples are never shortened."""
    on_overlong: Literal["error", "drop"] = "error"
    """error: a longer sample fails the run before its first step. drop: it is left out, counted and logged."""
    head_tolerance: float = Field(default=1e-6, ge=0.0, lt=1.0)
    """How much the loss head may leave out of a gradient where weights vanish with p, as those of dft do: 0 is exact,
    1e-5 is faster and less exact (``vlm_dft.head``). The loss itself is always exact."""
    head_backend: HeadBackend = "auto"
    """What computes the loss head. auto: torch, which serves everything. linear_cross_entropy (torch's own, fp32) and
    triton (CUDA) leave nothing out, whatever head_tolerance says, and have no anchor to the base model, as of asft."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: about a quarter slower, far less memory."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 on a GPU that has it, fp32 elsewhere."""
    checkpoint_every_steps: int = Field(default=100, ge=1)
    """What a crash costs at most; the last step has one in any case."""
    keep_checkpoints: int = Field(default=3, ge=1)
    """Only the newest ones are kept."""
    log_every_steps: int = Field(default=1, ge=1)
    """A line of metrics after every so many steps."""
    probe_rows: int = Field(default=16, ge=0, le=10_000)
    """Training rows, and held-out ones, whose targets' probabilities are counted at the start and the end; 0: none."""
    probe_every_steps: int | None = Field(default=None, ge=1)
    """The same on the way, after every so many steps; None: never."""
    sample_rows: int = Field(default=0, ge=0, le=64)
    """Held-out rows, or training rows without a held-out file, that the model answers at the same steps; 0: none."""
    sample_max_new_tokens: int = Field(default=256, ge=1, le=4096)
    """Where such an answer is cut."""

    @model_validator(mode="after")
    def _packs_or_micro_batches(self) -> Self:
        if self.packing and self.micro_batch_size != 1:
            raise ValueError(
                f"micro_batch_size {self.micro_batch_size} means nothing with packing: pack_length_tokens decides "
                "how many samples share a forward pass"
            )
        if self.pack_length_tokens is not None and not self.packing:
            raise ValueError(f"pack_length_tokens {self.pack_length_tokens} needs packing: set packing to true")
        return self

    @property
    def pack_length(self) -> int | None:
        """Tokens of a pack; None without packing."""
        return (self.pack_length_tokens or self.max_length_tokens) if self.packing else None

    @property
    def sample_limit(self) -> tuple[str, int]:
        """The setting that says how long a sample may be, and how long that is."""
        limits = {"max_length_tokens": self.max_length_tokens, "pack_length_tokens": self.pack_length}
        return min(((name, length) for name, length in limits.items() if length is not None), key=lambda item: item[1])
