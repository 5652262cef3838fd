"""One model answers one benchmark: what is missing is generated, graded and put on disk, answer by answer.

Knows nothing about how answers are generated (``generation``) or summed up. Torch-free.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from vlm_dft.config import BenchmarkConfig, EvalConfig, PixelConfig
from vlm_dft.data.pixels import num_visual_tokens
from vlm_dft.errors import DatasetError
from vlm_dft.evaluation.benchmarks import RULES
from vlm_dft.evaluation.grading import Grade
from vlm_dft.evaluation.items import Benchmark, Item
from vlm_dft.evaluation.judge import Judge
from vlm_dft.evaluation.judging import NEVER_JUDGED, Judged, judge_all, judged
from vlm_dft.evaluation.latex import LatexProcess
from vlm_dft.evaluation.predictions import Prediction, PredictionLog, sample_id
from vlm_dft.results import Progress
from vlm_dft.run_dir import RunDir

Role = Literal["base", "tuned"]
_PROGRESS_SECONDS = 1.0

_LOG = logging.getLogger(__name__)


class Answer(Protocol):
    """What a model wrote (``generation.Generated``)."""

    @property
    def text(self) -> str: ...
    @property
    def finish_reason(self) -> Literal["stop", "length", "error"]: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def error(self) -> str | None: ...


class Answerer(Protocol):
    """Who writes it (``generation.Generator``)."""

    def stream(self, items: Sequence[Item], samples: Sequence[int] | None = None) -> Iterator[tuple[int, Answer]]: ...


class Ask(NamedTuple):
    """One answer that is wanted."""

    item: Item
    sample: int

    @property
    def key(self) -> str:
        return sample_id(self.item.id, self.sample)


@dataclass(frozen=True)
class Answering:
    """See ``predictions``."""

    config: EvalConfig
    run: RunDir
    role: Role
    benchmark_config: BenchmarkConfig
    benchmark: Benchmark
    latex: LatexProcess
    judge: Judge | None = None

    def predictions(self, model: Answerer, identity: dict[str, Any]) -> list[Prediction]:
        """All samples of all items, in the benchmark's order; those on disk are not generated again."""
        items = {item.id: item for item in self.benchmark.items}
        name = self.benchmark_config.name

        def regrade(prediction: Prediction) -> Prediction:
            item = items.get(prediction.id)
            return prediction if item is None else prediction.graded(self.grade(item, prediction.prediction))

        log = PredictionLog.open(
            self.run.evaluation_path(self.role, name),
            identity,
            (attempt.evaluation_path(self.role, name) for attempt in earlier_attempts(self.config)),
            regrade,
        )
        wanted = [Ask(item, sample) for item in self.benchmark.items for sample in range(self.config.samples_per_item)]
        self._generate(model, wanted, log)
        predictions = [log.done[ask.key] for ask in wanted]
        if self.judge is not None and self.benchmark_config.kind not in NEVER_JUDGED:
            predictions = self._judged(predictions, self.judge)
        keys = {ask.key for ask in wanted}
        ordered = [*predictions, *(each for each in log.done.values() if each.key not in keys)]
        if ordered != list(log.done.values()):
            log.replace(ordered)  # as the benchmark has them, for whoever pages through them
        return predictions

    def _judged(self, predictions: Sequence[Prediction], judge: Judge) -> list[Prediction]:
        """The same, each graded by rules and, where these do not decide, by the judge. Raises EvaluationError."""
        items = {item.id: item for item in self.benchmark.items}
        kind, total = self.benchmark_config.kind, len(predictions)
        began = told = time.monotonic()

        def decide(prediction: Prediction) -> Judged:
            if prediction.judged:
                return Judged(prediction.grade, prediction.judged)
            item = items[prediction.id]
            return judged(kind, item, prediction.prediction, prediction.grade, judge, self.latex)

        def tell(done: int) -> None:
            nonlocal told
            now = time.monotonic()
            if now - told > _PROGRESS_SECONDS or done == total:
                told = now
                self._tell(done, total, (now - began) / done * (total - done), who="judge")

        tasks = [partial(decide, prediction) for prediction in predictions]
        found = judge_all(tasks, judge, tell)
        return [each.graded(*result) for each, result in zip(predictions, found, strict=True)]

    def grade(self, item: Item, response: str) -> Grade:
        return RULES[self.benchmark_config.kind].grade(item, response, self.latex)

    def _generate(self, model: Answerer, wanted: Sequence[Ask], log: PredictionLog) -> None:
        """What is missing, longest prompts first, so that memory runs out early or not at all."""
        missing = [ask for ask in wanted if ask.key not in log.done]
        missing.sort(key=prompt_length(self.config.pixels), reverse=True)  # stable: an item's samples stay together
        known = len(wanted) - len(missing)
        if known:
            _LOG.info("%s: %d of %d answers are there already", self.benchmark_config.name, known, len(wanted))
        begun = told = time.monotonic()
        self._tell(known, len(wanted), None if missing else 0.0)
        answers = model.stream([ask.item for ask in missing], [ask.sample for ask in missing])
        for done, (index, answer) in enumerate(answers, start=1):
            log.append([self._prediction(missing[index], answer)])
            now = time.monotonic()
            if now - told > _PROGRESS_SECONDS or done == len(missing):
                told = now
                self._tell(known + done, len(wanted), (now - begun) / done * (len(missing) - done))

    def _tell(self, done: int, total: int, seconds_remaining: float | None, who: str = "") -> None:
        name = self.benchmark_config.name
        self.run.write_progress(
            Progress(
                phase="evaluating",
                benchmark=f"{name} ({who})" if who else name,
                items_done=done,
                items_total=total,
                seconds_remaining=seconds_remaining,
            )
        )

    def _prediction(self, ask: Ask, answer: Answer) -> Prediction:
        grade = self.grade(ask.item, answer.text)
        return Prediction(
            id=ask.item.id,
            sample=ask.sample,
            prompt=ask.item.prompt,
            prediction=answer.text,
            extracted=grade.extracted,
            rule=grade.rule,
            answer=ask.item.answer,
            correct=grade.correct,
            finish_reason=answer.finish_reason,
            num_generated_tokens=answer.num_tokens,
            error=answer.error,
        )


def earlier_attempts(config: EvalConfig) -> Iterator[RunDir]:
    """The attempt that is resumed from, the one that it resumed from, and so on.

    An attempt that was killed early holds no answers of its own; those before it do.
    """
    seen: set[Path] = set()
    path = config.resume_from
    while path is not None and path not in seen:
        seen.add(path)
        run = RunDir(path)
        yield run
        evaluation = run.read_config().evaluation if run.config_path.is_file() else None
        path = evaluation.resume_from if evaluation else None


def prompt_length(pixels: PixelConfig) -> Callable[[Ask], float]:
    """About how many tokens a prompt has; only the order matters."""

    def length(ask: Ask) -> float:
        text = len(ask.item.prompt) / 3
        if ask.item.picture is None:
            return text
        try:
            return text + num_visual_tokens(*ask.item.picture.size(), pixels)
        except DatasetError:  # counted as a failure when it is asked
            return text

    return length
