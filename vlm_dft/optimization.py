"""One optimizer step: micro-batches in, summed gradients, an update, and what was counted on the way.

An explicit loop on accelerate's process state, and not transformers' Trainer, because the Trainer divides by what the
model class says it accepts (Qwen2.5-VL: by micro-batches instead of tokens), repeats samples to fill the last batch of
an epoch over several ranks, and synchronises gradients inside forward passes, which hangs when text-only and image
batches meet. What remains here is small: sums, one denominator, one synchronisation.
Knows nothing about datasets, files or how long a training is to go on.

Shapes: B samples of a micro-batch, T tokens, N = B x T rows, D hidden size, S statistics.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import vlm_dft.torchvision_shim  # noqa: F401

# isort: split
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, get_scheduler

from vlm_dft import objectives
from vlm_dft.batches import MicroBatch, derived_seed
from vlm_dft.compilation import compile_layers
from vlm_dft.config import TrainConfig
from vlm_dft.errors import ConfigError, NanLossError, OutOfMemoryError
from vlm_dft.forward import Forward
from vlm_dft.head import STATISTICS, LossSums, check_backend, objective_loss
from vlm_dft.model import LoadedModel, base_of, part_of
from vlm_dft.ranks import Ranks
from vlm_dft.reference import Reference
from vlm_dft.sharding import Sharding, is_sharded
from vlm_dft.telemetry import StepCounts

_ADAM_BYTES_PER_PARAMETER = 12  # gradient and two moments in float32


@dataclass(frozen=True)
class StepOutcome:
    """What one optimizer step did."""

    counts: StepCounts
    grad_norm: float
    """Before clipping."""
    learning_rate: float
    """Of the language model, where that is trained."""


class Optimization:
    """A model under training: its trainable parameters, optimizer and schedule."""

    def __init__(self, loaded: LoadedModel, config: TrainConfig, ranks: Ranks, total_steps: int) -> None:
        """loaded.model has requires_grad set. Its weights are cast: trainable ones to float32, frozen ones to dtype."""
        self._loaded = loaded
        self._config = config
        self._ranks = ranks
        self.objective = objectives.from_config(config.objective)
        self._largest_tokens = 0
        _cast(loaded)
        self.forward = Forward(loaded, packing=config.packing)
        head = self.forward.head
        rows = head.weight.new_empty(0, head.in_features, dtype=loaded.dtype)
        check_backend(config.head_backend, self.objective, rows, head.weight, head.bias)
        self._reference = Reference(loaded, config) if self.objective.needs_reference else None
        if config.gradient_checkpointing:
            _checkpoint_activations(base_of(loaded.model))
        if config.compile:
            compile_layers(base_of(loaded.model), loaded.device)
        self._sharding = Sharding(loaded, config, ranks)
        self.parameters = [parameter for parameter in loaded.model.parameters() if parameter.requires_grad]
        groups = _groups(loaded.model, config)
        self._optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)
        rates = [group["lr"] for group in groups]
        self._reported_group = rates.index(config.learning_rate) if config.learning_rate in rates else 0
        self._scheduler = get_scheduler(
            "cosine" if config.lr_schedule == "cosine" else "constant_with_warmup",
            self._optimizer,
            num_warmup_steps=math.ceil(config.warmup_ratio * total_steps),
            num_training_steps=total_steps,
        )

    def state_dict(self) -> dict[str, Any]:
        """Optimizer and schedule; the weights are the model's. To be called by all ranks."""
        optimizer = self._sharding.whole(self._optimizer.state_dict())
        return {"optimizer": optimizer, "scheduler": self._scheduler.state_dict()}

    def weights(self) -> dict[str, Tensor] | None:
        """The model's, where it holds parts of them; to be called by all ranks. None where the model has them whole."""
        return self._sharding.weights()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._optimizer.load_state_dict(self._sharding.cut(state["optimizer"], self._optimizer))
        self._scheduler.load_state_dict(state["scheduler"])

    def step(self, number: int, micro_batches: Sequence[MicroBatch]) -> StepOutcome:
        """One update from this rank's share of the global batch.

        Raises NanLossError naming step and rows, before weights are touched; OutOfMemoryError saying what would fit.
        """
        # The random state of a step is a function of seed and step: a resumed run draws what an uninterrupted one does.
        torch.manual_seed(derived_seed(self._config.seed, number, self._ranks.rank))
        self._loaded.model.train()
        with self.out_of_memory_explained(micro_batches):
            counts = self.gradients(micro_batches, number)
            grad_norm = self._sharding.clip_gradients(self.parameters, self._config.max_grad_norm).item()
            if not math.isfinite(grad_norm):
                self.raise_not_finite(f"gradient norm is {grad_norm}", number + 1, _rows(micro_batches))
            learning_rate = float(self._scheduler.get_last_lr()[self._reported_group])
            self._optimizer.step()
        self._scheduler.step()
        self._optimizer.zero_grad(set_to_none=True)
        return StepOutcome(counts, grad_norm, learning_rate)

    def gradients(self, micro_batches: Sequence[MicroBatch], number: int = 0) -> StepCounts:
        """Add the gradient of (sum of weight x NLL) / (supervised tokens of all micro-batches of all ranks).

        The denominator is the same however the batch was split, and for every objective.
        """
        denominator = max(1, self._ranks.sum_number(sum(m.num_tokens for m in micro_batches)))
        parts = []
        for micro_batch in micro_batches:
            sums = self._loss(micro_batch, denominator)
            if sums.loss.requires_grad:  # not where only the vision tower is trained and there is no picture
                sums.loss.backward()
            parts.append(sums.statistics_S)
            self._largest_tokens = max(self._largest_tokens, micro_batch.padded_tokens)
        self._sharding.sum_gradients(self.parameters)
        counts = self.counts(self._totals(micro_batches, parts))
        if not counts.are_finite:
            bad = [m for m, part_S in zip(micro_batches, parts, strict=True) if not torch.isfinite(part_S).all()]
            self.raise_not_finite(f"loss is {counts.nll}", number + 1, _rows(bad))
        return counts

    @torch.no_grad()
    def measure(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """Statistics, input tokens and samples of this rank's held-out micro-batches: add them up, then ``counts``."""
        self._loaded.model.eval()
        with self.out_of_memory_explained(micro_batches):
            parts = [self._loss(micro_batch).statistics_S for micro_batch in micro_batches]
        return self._totals(micro_batches, parts)

    def counts(self, totals: Tensor) -> StepCounts:
        """Totals of this rank, summed over ranks. Waits for the device."""
        *sums, input_tokens, num_samples = self._ranks.sum(totals).tolist()
        return StepCounts(dict(zip(STATISTICS, sums, strict=True)), int(input_tokens), int(num_samples))

    def _totals(self, micro_batches: Sequence[MicroBatch], parts: list[Tensor]) -> Tensor:
        counted = [sum(m.input_tokens for m in micro_batches), sum(len(m.row_ids) for m in micro_batches)]
        counted_2 = torch.tensor(counted, dtype=torch.float64, device=self._ranks.device)
        zero_S = counted_2.new_zeros(len(STATISTICS))
        return torch.cat([torch.stack(parts).sum(dim=0) if parts else zero_S, counted_2])

    def _loss(self, micro_batch: MicroBatch, denominator: float = 1.0) -> LossSums:
        """The model's body, then the head over supervised rows only."""
        hidden_ND = self.forward(micro_batch)
        device, objective = hidden_ND.device, self.objective
        given: dict[str, Any] = {}
        if objective.needs_segments:
            given["segments_N"] = micro_batch.segments_N.to(device)
        if objective.needs_ref_logp and micro_batch.ref_logp_N is not None:
            given["ref_logp_N"] = micro_batch.ref_logp_N.to(device)
        if self._reference is not None:
            head = self._reference.head
            given |= {"ref_weight_VD": head.weight, "ref_bias_V": head.bias}
            given["ref_hidden_ND"] = self._reference.hidden_ND(micro_batch)
        return objective_loss(
            hidden_ND,
            self.forward.head.weight,
            micro_batch.labels_BT.flatten().to(device, non_blocking=True),
            objective=objective,
            bias_V=self.forward.head.bias,
            eos_token_id=self._loaded.end_of_turn_token_id,
            denominator=denominator,
            tolerance=self._config.head_tolerance,
            backend=self._config.head_backend,
            **given,
        )

    def raise_not_finite(self, what: str, step: int, row_ids: Sequence[str]) -> None:
        """Raises NanLossError; to be called by all ranks, each with the rows of its own that are to blame."""
        rows = [row_id for share in self._ranks.gather(list(row_ids)) for row_id in share]
        shown = ", ".join(rows[:8]) + (", ..." if len(rows) > 8 else "")
        remedy = "lower learning_rate, or look at these rows; the last checkpoint was kept"
        if step == 0:
            remedy = "nothing was trained yet: look at the model's weights, and at these rows"
        raise NanLossError(f"the {what} at step {step}, rows {shown}: {remedy}")

    @contextmanager
    def out_of_memory_explained(self, micro_batches: Sequence[MicroBatch] = ()) -> Iterator[None]:
        """Turns torch's error into OutOfMemoryError; micro_batches: those of the step that is being made."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(self._what_would_fit(micro_batches)) from error

    def _what_would_fit(self, micro_batches: Sequence[MicroBatch]) -> str:
        tokens, samples = max(((m.padded_tokens, len(m.row_ids)) for m in micro_batches), default=(0, 0))
        trainable = sum(parameter.numel() for parameter in self.parameters)
        weights = sum(parameter.nbytes for parameter in self._loaded.model.parameters())
        fixed_gib = (weights + trainable * _ADAM_BYTES_PER_PARAMETER) / 2**30
        what = "pack" if self._config.packing else "micro-batch"
        parts = [
            f"{self._ranks.device} ran out of memory; weights, gradients and optimizer alone take {fixed_gib:.1f} GiB"
        ]
        if micro_batches:
            padding = "" if self._config.packing else " with padding"
            parts.append(f"the step's largest {what} has {samples} samples and {tokens} tokens{padding}")
        if self._largest_tokens:
            parts.append(f"{self._largest_tokens} tokens did fit")
        return "; ".join(parts) + ". Try " + ", or ".join(self._remedies(micro_batches, samples))

    def _remedies(self, micro_batches: Sequence[MicroBatch], samples: int) -> list[str]:
        """Settings that need less memory, the gentlest first."""
        remedies = []
        longest = max((max(m.segment_lengths or (0,)) for m in micro_batches), default=0)
        packed = max((m.input_tokens for m in micro_batches), default=0)
        if self._config.packing and longest < packed:
            remedies.append(f"pack_length_tokens {max(longest, packed // 2)}")
        elif not self._config.packing and samples > 1:
            remedies.append(f"micro_batch_size {samples // 2}")
        if not self._config.gradient_checkpointing:
            remedies.append("gradient_checkpointing true")
        if not isinstance(self._loaded.model, PeftModel):
            remedies.append("adapter lora")
        elif self._loaded.quantization is None:
            remedies.append("adapter.quantization nf4")
        remedies.append("a smaller pixels.max_pixels or max_length_tokens")
        return remedies


def _rows(micro_batches: Sequence[MicroBatch]) -> list[str]:
    return [row_id for micro_batch in micro_batches for row_id in micro_batch.row_ids]


def _checkpoint_activations(model: PreTrainedModel) -> None:
    # transformers renamed it after 5.17.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _cast(loaded: LoadedModel) -> None:
    """Trainable weights are float32, so that small updates are not lost; frozen ones take the computation's type."""
    for parameter in loaded.model.parameters():
        if not parameter.is_floating_point():  # 4-bit weights
            continue
        dtype = torch.float32 if parameter.requires_grad else loaded.dtype
        if parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)


def _groups(model: torch.nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Each part's learning rate; weight decay for matrices, none for norms and biases."""
    rates = {"vision_tower": config.vision_learning_rate, "merger": config.merger_learning_rate}
    groups: dict[tuple[bool, float, bool], list[torch.nn.Parameter]] = {}
    trained = set()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        trained.add(part := part_of(name))
        is_vector = parameter.ndim < 2
        # One kernel updates a group: whole parameters and parts of some cannot share it.
        key = (is_vector, rates.get(part) or config.learning_rate, is_sharded(parameter))
        groups.setdefault(key, []).append(parameter)
    for part, rate in rates.items():
        if rate is not None and part not in trained:
            param = f"{part.removesuffix('_tower')}_learning_rate"
            raise ConfigError(
                f"{param} is {rate}, but no parameter of the {part.replace('_', ' ')} is trained: leave it out, or "
                f"set freeze.{part} to false",
                param=f"train.{param}",
            )
    return [
        {"params": parameters, "lr": rate, "weight_decay": 0.0 if is_vector else config.weight_decay}
        for (is_vector, rate, _), parameters in sorted(groups.items(), key=lambda item: item[0][0])
    ]
