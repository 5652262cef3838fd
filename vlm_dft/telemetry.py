"""What a training tells the outside: metrics.jsonl, histograms.jsonl, samples.jsonl, progress.json.

Divides sums by counts, once, here. Knows nothing about models; it is given the head's sums and what was counted.
"""

from __future__ import annotations

import logging
import math
import resource
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from vlm_dft.results import AccuracyPoint, Histogram, Phase, Progress, SampleAnswer, StepMetrics, ValidationMetrics
from vlm_dft.run_dir import RunDir

log = logging.getLogger(__name__)

_PROGRESS_EVERY_SECONDS = 1.0


@dataclass(frozen=True)
class StepCounts:
    """What was counted in one optimizer step, over all ranks."""

    sums: dict[str, float]
    """The head's statistics by name (``vlm_dft.head.STATISTICS``)."""
    input_tokens: int
    num_samples: int

    @property
    def num_tokens(self) -> int:
        return int(self.sums["num_tokens"])

    def mean(self, name: str) -> float:
        """A sum over supervised tokens, per token; 0 for a batch without any."""
        return self.sums[name] / self.num_tokens if self.num_tokens else 0.0

    @property
    def nll(self) -> float:
        return self.mean("nll_sum")

    @property
    def are_finite(self) -> bool:
        """Whether both losses are numbers."""
        return math.isfinite(self.sums["nll_sum"] + self.sums["objective_sum"])


def step_metrics(
    counts: StepCounts,
    *,
    step: int,
    epoch: float,
    grad_norm: float,
    learning_rate: float,
    seconds: float,
    waited_seconds: float,
    device: torch.device,
    anchored: bool = False,
) -> StepMetrics:
    """One line of metrics.jsonl; seconds is the time of this one step, waited_seconds the part before its data came.

    anchored: the objective has an anchor to a reference model.
    """
    sums = counts.sums
    squared = counts.num_tokens * sums["weight_sq_sum"]
    return StepMetrics(
        step=step,
        epoch=epoch,
        objective_loss=counts.mean("objective_sum"),
        nll=counts.nll,
        mean_weight=counts.mean("weight_sum"),
        effective_sample_size=sums["weight_sum"] ** 2 / squared if squared else 0.0,
        share_p_below_01=counts.mean("p_below_01_count"),
        share_p_above_09=counts.mean("p_above_09_count"),
        eos_nll=sums["eos_nll_sum"] / sums["eos_count"] if sums["eos_count"] else None,
        entropy=counts.mean("entropy_sum"),
        token_accuracy=counts.mean("correct_count"),
        kl=counts.mean("kl_sum") if anchored else None,
        num_tokens=counts.num_tokens,
        input_tokens=counts.input_tokens,
        num_samples=counts.num_samples,
        grad_norm=grad_norm,
        learning_rate=learning_rate,
        tokens_per_second=counts.input_tokens / seconds,
        samples_per_second=counts.num_samples / seconds,
        peak_memory_gib=peak_memory_gib(device),
        data_wait_share=waited_seconds / seconds,
        time=time.time(),
    )


def validation_metrics(counts: StepCounts, step: int) -> ValidationMetrics:
    """Held-out loss over the whole validation set."""
    return ValidationMetrics(
        step=step,
        valid_nll=counts.nll,
        valid_objective_loss=counts.mean("objective_sum"),
        valid_token_accuracy=counts.mean("correct_count"),
        valid_num_tokens=counts.num_tokens,
        time=time.time(),
    )


def checkpoint_metrics(train: StepMetrics | None, valid: ValidationMetrics | None) -> dict[str, float]:
    """The numbers that complete.json carries, under the names that metrics.jsonl gives them."""
    chosen: dict[str, float] = {}
    if train is not None:
        chosen |= {name: getattr(train, name) for name in ("objective_loss", "nll", "token_accuracy")}
    if valid is not None:
        names = ("valid_nll", "valid_objective_loss", "valid_token_accuracy")
        chosen |= {name: getattr(valid, name) for name in names}
    return chosen


def peak_memory_gib(device: torch.device) -> float:
    """Of the device; on a CPU of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Reporter:
    """Writes one run's files; told by every rank, writes on the first only."""

    def __init__(self, run: RunDir, *, writes: bool) -> None:
        self._run = run
        self._writes = writes
        self._progress = Progress(phase="starting")
        self._written_at = 0.0
        self._started_at = 0.0
        self._started_step = 0
        self._input_tokens = 0

    def forget_after(self, step: int) -> None:
        """Take out what an earlier process of this directory wrote after the checkpoint we resume from."""
        if self._writes:
            self._run.forget_after(step)

    def phase(self, phase: Phase) -> None:
        """A change of phase is written at once."""
        self._progress = self._progress.model_copy(update={"phase": phase})
        self._write(force=True)

    def start(self, step: int, total_steps: int) -> None:
        """The first step is about to begin: time and tokens count from now."""
        self._started_at, self._started_step, self._input_tokens = time.monotonic(), step, 0
        self._progress = Progress(phase="running", step=step, total_steps=total_steps)
        self._write(force=True)

    def step_done(self, step: int, input_tokens: int) -> None:
        self._input_tokens += input_tokens
        seconds = time.monotonic() - self._started_at
        remaining = (self._progress.total_steps or step) - step
        self._progress = self._progress.model_copy(
            update={
                "step": step,
                "tokens_per_second": self._input_tokens / seconds,
                "seconds_remaining": remaining * seconds / (step - self._started_step),
            }
        )
        self._write(force=False)

    def metrics(self, metrics: StepMetrics | ValidationMetrics) -> None:
        if self._writes:
            self._run.append_metrics(metrics)

    def accuracy(self, point: AccuracyPoint) -> None:
        if self._writes:
            self._run.append_accuracy(point)

    def histograms(self, histograms: list[Histogram]) -> None:
        if self._writes:
            for histogram in histograms:
                self._run.append_histogram(histogram)

    def samples(self, answers: Iterable[SampleAnswer]) -> None:
        if self._writes:
            for answer in answers:
                self._run.append_sample(answer)

    def _write(self, *, force: bool) -> None:
        now = time.monotonic()
        if self._writes and (force or now - self._written_at >= _PROGRESS_EVERY_SECONDS):
            self._run.write_progress(self._progress)
            self._written_at = now
