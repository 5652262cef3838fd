"""One evaluation: benchmarks are read, then each model answers all of them, and scores are written.

Order of failures: a benchmark that cannot be read and a judge that does not work cost nothing, because both are looked
at before any model is loaded; what fails later leaves predictions behind, and a rerun goes on from them. Knows nothing
about training or the service.
"""

from __future__ import annotations

import gc
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vlm_dft.torchvision_shim  # noqa: F401

# isort: split
import torch

from vlm_dft.config import BenchmarkConfig, BenchmarkKind, EvalConfig
from vlm_dft.data.encoding import IMAGE_BACKEND
from vlm_dft.errors import ConfigError, EvaluationError
from vlm_dft.evaluation.answering import Answering, Role
from vlm_dft.evaluation.benchmarks import RULES, load_benchmark, scorer_of
from vlm_dft.evaluation.contamination import BenchmarkOverlaps, report_overlaps, without_overlaps
from vlm_dft.evaluation.generation import Generator
from vlm_dft.evaluation.grading import JUDGE, Grade, Summary, average
from vlm_dft.evaluation.item_files import keep_items, pictures_dir
from vlm_dft.evaluation.items import Benchmark
from vlm_dft.evaluation.judge import Judge
from vlm_dft.evaluation.judging import NEVER_JUDGED
from vlm_dft.evaluation.latex import LatexProcess
from vlm_dft.evaluation.predictions import PREDICTIONS_NAME, SCORE_NAME, Prediction, PredictionLog
from vlm_dft.evaluation.score_cache import ScoreCache
from vlm_dft.model import LoadedModel, load
from vlm_dft.model_files import config_sha256, locate, model_sha256
from vlm_dft.results import Progress, Score
from vlm_dft.run_dir import RunDir, write_json


@dataclass(frozen=True)
class Asked:
    """A benchmark as configured: the items to ask, and the whole file's identity."""

    config: BenchmarkConfig
    benchmark: Benchmark
    file_sha256: str


@dataclass(frozen=True)
class Model:
    """A loaded model and what a score says about it."""

    role: Role
    source: str
    path: Path
    sha256: str
    loaded: LoadedModel


def evaluate(
    config: EvalConfig, run: RunDir, *, tuned: str, base: str | None, base_revision: str | None = None
) -> tuple[Score, ...]:
    """Score tuned, and base if given, on every benchmark; tuned's scores come first.

    Writes evaluation/<role>/<benchmark>/{identity.json, predictions.jsonl, score.json}.
    Raises BenchmarkError, EvaluationError, ModelError, ConfigError, OutOfMemoryError, DiskFullError.
    """
    scores: list[Score] = []
    with LatexProcess() as latex:
        latex.start()
        asked = _read_benchmarks(config)
        for entry in asked:
            keep_items(run, entry.config.name, entry.benchmark, pictures_dir(config))
        judge = _open_judge(config, run)
        overlaps = report_overlaps(config, run, {entry.config.name: entry.benchmark for entry in asked})
        scoring = Scoring(config, run, latex, judge, overlaps)
        sources: list[tuple[Role, str, str | None]] = [("tuned", tuned, config.revision if config.model else None)]
        if base is not None:
            sources.append(("base", base, base_revision))
        for role, source, revision in sources:
            run.write_progress(Progress(phase="loading_model"))
            path = locate(source, revision)
            model = Model(role, source, path, model_sha256(path), load(source, revision=revision))
            scores += scoring.scores(model, asked)
            del model
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    return tuple(scores)


def _read_benchmarks(config: EvalConfig) -> list[Asked]:
    asked = []
    for entry in config.benchmarks:
        if entry.kind == "wemath" and config.samples_per_item > 1:
            raise ConfigError(
                f"{entry.name}: We-Math grades one answer to a problem and to each of its steps: samples_per_item must "
                f"be 1, not {config.samples_per_item}",
                param="evaluation.samples_per_item",
            )
        whole = load_benchmark(entry, config.prompt)
        asked.append(Asked(entry, whole.first(entry.limit), whole.sha256))
    return asked


def _open_judge(config: EvalConfig, run: RunDir) -> Judge | None:
    """The judge, known to work. Raises EvaluationError before anything is generated."""
    if config.judge is None:
        return None
    judge = Judge(config.judge, (config.score_cache or run.path / "evaluation") / "judge")
    judge.preflight()
    return judge


@dataclass(frozen=True)
class Scoring:
    """What all scores of one evaluation share."""

    config: EvalConfig
    run: RunDir
    latex: LatexProcess
    judge: Judge | None
    overlaps: Mapping[str, BenchmarkOverlaps]
    """With the training data, by benchmark; absent where that is not known."""

    def scores(self, model: Model, asked: Sequence[Asked]) -> list[Score]:
        """One model's, in the order of the benchmarks; generated, or taken from the cache."""
        generator = Generator(model.loaded, self.config, self.config.pixels)
        return [self._score(model, generator, entry) for entry in asked]

    def _score(self, model: Model, generator: Generator, asked: Asked) -> Score:
        if not model.loaded.is_vision and any(item.picture for item in asked.benchmark.items):
            raise EvaluationError(
                f"{model.source} is a text model and cannot see the pictures of {asked.config.name}: use a vision model"
            )
        cache = ScoreCache(self.config.score_cache) if self.config.score_cache else None
        identity = self._identity(model, generator, asked)
        of_cache = {**identity, "items_sha256": asked.benchmark.sha256, "config_sha256": config_sha256(model.path)}
        directory = self.run.evaluation_path(model.role, asked.config.name)
        names = {
            "benchmark": asked.config.name,
            "model": model.source,
            "model_role": model.role,
            "predictions": str((directory / PREDICTIONS_NAME).relative_to(self.run.path)),
        }
        if cache is not None and (entry := cache.find(of_cache)) is not None:
            predictions = entry.predictions
            PredictionLog.open(directory, identity).replace(predictions)
            score = entry.score.model_copy(update={**names, "from_cache": True})
        else:
            begun = time.monotonic()
            answering = Answering(
                self.config, self.run, model.role, asked.config, asked.benchmark, self.latex, self.judge
            )
            predictions = answering.predictions(generator, identity)
            score = self._record(model, asked, predictions, names, time.monotonic() - begun)
            if cache is not None:
                cache.put(of_cache, score, predictions)
        score = score.model_copy(update=self._without_overlaps(asked, predictions))
        write_json(directory / SCORE_NAME, score)
        return score

    def _without_overlaps(self, asked: Asked, predictions: Sequence[Prediction]) -> dict[str, Any]:
        """The score's fields about the training data: of this run, never of the cache."""
        overlapping = self.overlaps.get(asked.config.name)
        if overlapping is None:
            return {}
        summary = summarize(asked.config.kind, asked.benchmark, predictions, self.config.samples_per_item)
        return without_overlaps(asked.benchmark, summary, overlapping)

    def _record(
        self, model: Model, asked: Asked, predictions: Sequence[Prediction], names: dict[str, Any], seconds: float
    ) -> Score:
        summary = summarize(asked.config.kind, asked.benchmark, predictions, self.config.samples_per_item)
        return Score(
            **names,
            kind=asked.config.kind,
            model_sha256=model.sha256,
            metric=summary.metric,
            value=summary.estimate.value,
            numerator=summary.estimate.numerator,
            denominator=summary.estimate.denominator,
            standard_error=summary.estimate.standard_error,
            n=len(asked.benchmark.items),
            n_total=asked.benchmark.num_total,
            whole=summary.whole,
            items_sha256=asked.benchmark.sha256,
            by_category=summary.by_category,
            scorer=scorer_of(asked.config.kind),
            judge=self._judge_of(asked.config.kind),
            judged=sum(bool(entry.judged) for entry in predictions),
            prompt=self.config.prompt,
            generation={**self._settings(model), "batch_size": self.config.batch_size},
            pixels=self.config.pixels.model_dump(),
            image_backend=IMAGE_BACKEND,
            failure_rate=sum(entry.failed for entry in predictions) / len(predictions),
            extraction_rate=sum(entry.extracted is not None for entry in predictions) / len(predictions),
            wall_seconds=seconds,
        )

    def _judge_of(self, kind: BenchmarkKind) -> str:
        return JUDGE if self.judge is None or kind in NEVER_JUDGED else self.judge.name

    def _settings(self, model: Model) -> dict[str, Any]:
        """Everything that decides an answer beside model, items and pixels."""
        config = self.config
        return {
            "max_new_tokens": config.max_new_tokens,
            "temperature": config.temperature,
            "samples_per_item": config.samples_per_item,
            "seed": config.seed if config.temperature > 0 else None,
            "repetition_penalty": 1.0,
            "system_prompt": config.system_prompt,
            "precision": str(model.loaded.dtype).removeprefix("torch."),
        }

    def _identity(self, model: Model, generator: Generator, asked: Asked) -> dict[str, Any]:
        """What must be equal for an old prediction to be as good as a new one."""
        return {
            "model_sha256": model.sha256,
            "chat_template_sha256": hashlib.sha256(generator.encoder.template.source.encode()).hexdigest(),
            "benchmark_sha256": asked.file_sha256,
            "scorer": scorer_of(asked.config.kind),
            "judge": self._judge_of(asked.config.kind),
            "generation": self._settings(model),
            "pixels": self.config.pixels.model_dump(),
            "image_backend": IMAGE_BACKEND,
        }


def summarize(kind: BenchmarkKind, benchmark: Benchmark, predictions: Sequence[Prediction], samples: int) -> Summary:
    """The benchmark's own summary of one answer per item, or its average over that many samples."""
    passes: list[dict[str, Grade]] = [{} for _ in range(samples)]
    for prediction in predictions:
        passes[prediction.sample][prediction.id] = prediction.grade
    return average([RULES[kind].summarize(benchmark, grades) for grades in passes])
