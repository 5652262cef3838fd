"""Accuracy on a few fixed benchmark items while a model is being trained, and when it no longer grows.

Loss falls while answers get worse: the probe generates answers with the weights as they are and grades them by the
benchmark's own rules. It leaves no trace: modes, generation settings and random numbers are afterwards as they were, so
that a training with a probe equals one without, until the probe ends it. Ranks share the items.
Knows nothing about steps but their numbers. Not covered: judges, and models cut over ranks (fsdp).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import vlm_dft.torchvision_shim  # noqa: F401

# isort: split
import torch

from vlm_dft.compilation import as_written
from vlm_dft.config import AccuracyProbeConfig, PixelConfig
from vlm_dft.errors import EvaluationError
from vlm_dft.evaluation.benchmarks import RULES, load_benchmark
from vlm_dft.evaluation.generation import Generator
from vlm_dft.evaluation.grading import Grade
from vlm_dft.evaluation.items import Item
from vlm_dft.evaluation.latex import LatexProcess
from vlm_dft.model import LoadedModel, base_of
from vlm_dft.ranks import Ranks
from vlm_dft.results import AccuracyPoint


class AccuracyProbe:
    """One benchmark, asked again and again."""

    def __init__(self, config: AccuracyProbeConfig, loaded: LoadedModel, pixels: PixelConfig) -> None:
        """Raises BenchmarkError, EvaluationError: before the first step, not in the middle of the training."""
        whole = load_benchmark(config.benchmark, config.generation.prompt)
        self.config, self.loaded, self.pixels = config, loaded, pixels
        self.benchmark = whole.first(config.benchmark.limit)
        if not loaded.is_vision and any(item.picture for item in self.benchmark.items):
            name = config.benchmark.name
            raise EvaluationError(f"the probe's benchmark {name} has pictures, and the model is a text model")

    def is_due(self, step: int, total_steps: int) -> bool:
        """Before the first step, every so many, and after the last."""
        return step in (0, total_steps) or step % self.config.every_steps == 0

    def measure(self, ranks: Ranks, step: int) -> AccuracyPoint:
        """Answer and grade all items; the same result on every rank. Raises EvaluationError, OutOfMemoryError."""
        began = time.monotonic()
        items = self.benchmark.items
        grades: dict[str, Grade] = {}
        for share in ranks.gather(self._grades(items[ranks.rank :: ranks.count])):
            grades |= share
        summary = RULES[self.config.benchmark.kind].summarize(self.benchmark, grades)
        estimate = summary.estimate
        return AccuracyPoint(
            step=step,
            probe_benchmark=self.config.benchmark.name,
            probe_metric=summary.metric,
            probe_value=estimate.value,
            probe_numerator=estimate.numerator,
            probe_denominator=estimate.denominator,
            probe_standard_error=estimate.standard_error,
            probe_items=len(items),
            probe_seconds=time.monotonic() - began,
            time=time.time(),
        )

    def ends(self, points: Sequence[AccuracyPoint]) -> bool:
        """Whether the last ``patience`` measurements have brought no value above the best one before them."""
        patience = self.config.patience
        if patience is None or len(points) <= patience:
            return False
        values = [point.probe_value for point in points]
        return max(values[-patience:]) <= max(values[:-patience])

    def is_best(self, points: Sequence[AccuracyPoint]) -> bool:
        """Whether the last measurement is above all others after the first step, and its weights are to be kept."""
        if self.config.patience is None or not points or points[-1].step == 0:
            return False
        return all(point.probe_value < points[-1].probe_value for point in points[:-1] if point.step > 0)

    def _grades(self, items: Sequence[Item]) -> dict[str, Grade]:
        kind, batch_size = self.config.benchmark.kind, self.config.generation.batch_size
        found: dict[str, Grade] = {}
        with untouched(self.loaded), LatexProcess() as latex:
            generator = Generator(self.loaded, self.config.generation, self.pixels)
            for start in range(0, len(items), batch_size):
                batch = items[start : start + batch_size]
                answers = zip(batch, generator.answers(batch), strict=True)
                found |= {item.id: RULES[kind].grade(item, answer.text, latex) for item, answer in answers}
        return found


@contextmanager
def untouched(loaded: LoadedModel) -> Iterator[None]:
    """Within: the model as it answers, computing in its training's precision; afterwards everything is as it was."""
    model = base_of(loaded.model)
    modes = [(module, module.training) for module in loaded.model.modules()]
    settings = model.generation_config
    loaded.model.eval()
    try:
        dtype = loaded.dtype
        with as_written(model), torch.autocast(loaded.device.type, dtype, enabled=dtype != torch.float32):
            yield
    finally:
        model.generation_config = settings
        for module, was_training in modes:
            module.training = was_training
