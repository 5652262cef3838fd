"""One evaluation: benchmarks are read, then each model answers all of them, and scores are written.

Order of failures: a benchmark that cannot be read costs nothing, because it is read before any model is loaded; what
fails later leaves predictions behind, and a rerun goes on from them. Knows nothing about training or the service.
"""

from __future__ import annotations

import gc
import hashlib
import time
from collections.abc import Sequence
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
from vlm_dft.evaluation.generation import Generator
from vlm_dft.evaluation.grading import JUDGE, Grade, Summary, average
from vlm_dft.evaluation.items import Benchmark
from vlm_dft.evaluation.judge import Judge
from vlm_dft.evaluation.judging import NEVER_JUDGED
from vlm_dft.evaluation.latex import LatexProcess
from vlm_dft.evaluation.predictions import PREDICTIONS_NAME, SCORE_NAME, Prediction
from vlm_dft.model import LoadedModel, load
from vlm_dft.model_files import locate, model_sha256
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
    sha256: str
    loaded: LoadedModel


def evaluate(
    config: EvalConfig, run: RunDir, *, tuned: str, base: str | None, base_revision: str | None = None
) -> tuple[Score, ...]:
    """Score tuned, and base if given, on every benchmark; tuned's scores come first.

    Writes evaluation/<role>/<benchmark>/{identity.json, predictions.jsonl, score.json}.
    Raises BenchmarkError, EvaluationError, ModelError, ConfigError, OutOfMemoryError, DiskFullError.
    """
    scores = []
    with LatexProcess() as latex:
        latex.start()
        asked = _read_benchmarks(config, run)
        judge = _open_judge(config, run)
        sources: list[tuple[Role, str, str | None]] = [("tuned", tuned, config.revision if config.model else None)]
        if base is not None:
            sources.append(("base", base, base_revision))
        for role, source, revision in sources:
            run.write_progress(Progress(phase="loading_model"))
            model = Model(role, source, model_sha256(locate(source, revision)), load(source, revision=revision))
            generator = Generator(model.loaded, config, config.pixels)
            scores += [_score(config, run, model, generator, entry, latex, judge) for entry in asked]
            del model, generator
            gc.collect()
            torch.cuda.empty_cache()
    return tuple(scores)


def _read_benchmarks(config: EvalConfig, run: RunDir) -> list[Asked]:
    directories: dict[Path, str] = {}
    asked = []
    for entry in config.benchmarks:
        directory = run.evaluation_path("tuned", entry.name)
        if directory in directories:
            raise ConfigError(
                f"the benchmarks {directories[directory]!r} and {entry.name!r} would write to the same directory: "
                "rename one",
                param="evaluation.benchmarks",
            )
        directories[directory] = entry.name
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
    judge = Judge(config.judge, run.path / "evaluation" / "judge")
    judge.preflight()
    return judge


def _judge_of(kind: BenchmarkKind, judge: Judge | None) -> str:
    return JUDGE if judge is None or kind in NEVER_JUDGED else judge.name


def _score(
    config: EvalConfig,
    run: RunDir,
    model: Model,
    generator: Generator,
    asked: Asked,
    latex: LatexProcess,
    judge: Judge | None,
) -> Score:
    if not model.loaded.is_vision and any(item.picture for item in asked.benchmark.items):
        raise EvaluationError(
            f"{model.source} is a text model and cannot see the pictures of {asked.config.name}: use a vision model"
        )
    begun = time.monotonic()
    answering = Answering(config, run, model.role, asked.config, asked.benchmark, latex, judge)
    predictions = answering.predictions(generator, _identity(config, model, generator, asked, judge))
    summary = summarize(asked.config.kind, asked.benchmark, predictions, config.samples_per_item)
    directory = run.evaluation_path(model.role, asked.config.name)
    score = Score(
        benchmark=asked.config.name,
        kind=asked.config.kind,
        model=model.source,
        model_role=model.role,
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
        judge=_judge_of(asked.config.kind, judge),
        judged=sum(bool(entry.judged) for entry in predictions),
        prompt=config.prompt,
        generation={**_settings(config, model), "batch_size": config.batch_size},
        pixels=config.pixels.model_dump(),
        image_backend=IMAGE_BACKEND,
        failure_rate=sum(entry.failed for entry in predictions) / len(predictions),
        extraction_rate=sum(entry.extracted is not None for entry in predictions) / len(predictions),
        predictions=str((directory / PREDICTIONS_NAME).relative_to(run.path)),
        wall_seconds=time.monotonic() - begun,
    )
    write_json(directory / SCORE_NAME, score)
    return score


def summarize(kind: BenchmarkKind, benchmark: Benchmark, predictions: Sequence[Prediction], samples: int) -> Summary:
    """The benchmark's own summary of one answer per item, or its average over that many samples."""
    passes: list[dict[str, Grade]] = [{} for _ in range(samples)]
    for prediction in predictions:
        passes[prediction.sample][prediction.id] = prediction.grade
    return average([RULES[kind].summarize(benchmark, grades) for grades in passes])


def _settings(config: EvalConfig, model: Model) -> dict[str, Any]:
    """Everything that decides an answer beside model, items and pixels."""
    return {
        "max_new_tokens": config.max_new_tokens,
        "temperature": config.temperature,
        "samples_per_item": config.samples_per_item,
        "seed": config.seed if config.temperature > 0 else None,
        "repetition_penalty": 1.0,
        "system_prompt": config.system_prompt,
        "precision": str(model.loaded.dtype).removeprefix("torch."),
    }


def _identity(
    config: EvalConfig, model: Model, generator: Generator, asked: Asked, judge: Judge | None
) -> dict[str, Any]:
    """What must be equal for an old prediction to be as good as a new one."""
    return {
        "model_sha256": model.sha256,
        "chat_template_sha256": hashlib.sha256(generator.encoder.template.source.encode()).hexdigest(),
        "benchmark_sha256": asked.file_sha256,
        "scorer": scorer_of(asked.config.kind),
        "judge": _judge_of(asked.config.kind, judge),
        "generation": _settings(config, model),
        "pixels": config.pixels.model_dump(),
        "image_backend": IMAGE_BACKEND,
    }
