"""One evaluation: benchmarks are read, then each model answers all of them, and scores are written.

Order of failures: a benchmark that cannot be read costs nothing, because it is read before any model is loaded; what
fails later leaves predictions behind, and a rerun goes on from them. Knows nothing about training or the service.
"""

from __future__ import annotations

import gc
import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import vlm_dft.torchvision_shim  # noqa: F401

# isort: split
import torch

from vlm_dft.config import BenchmarkConfig, EvalConfig
from vlm_dft.data.encoding import IMAGE_BACKEND
from vlm_dft.data.pixels import num_visual_tokens
from vlm_dft.errors import ConfigError, DatasetError, EvaluationError
from vlm_dft.evaluation.benchmarks import RULES, load_benchmark
from vlm_dft.evaluation.generation import Generated, Generator
from vlm_dft.evaluation.grading import JUDGE, SCORER, Grade
from vlm_dft.evaluation.items import Benchmark, Item
from vlm_dft.evaluation.latex import LatexProcess
from vlm_dft.evaluation.predictions import PREDICTIONS_NAME, SCORE_NAME, Prediction, PredictionLog
from vlm_dft.model import LoadedModel, load
from vlm_dft.model_files import locate, model_sha256
from vlm_dft.results import Progress, Score
from vlm_dft.run_dir import RunDir, write_json

Role = Literal["base", "tuned"]


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
        sources: list[tuple[Role, str, str | None]] = [("tuned", tuned, config.revision if config.model else None)]
        if base is not None:
            sources.append(("base", base, base_revision))
        for role, source, revision in sources:
            run.write_progress(Progress(phase="loading_model"))
            model = Model(role, source, model_sha256(locate(source, revision)), load(source, revision=revision))
            generator = Generator(model.loaded, config, config.pixels)
            scores += [_score(config, run, model, generator, entry, latex) for entry in asked]
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
        whole = load_benchmark(entry, config.prompt)
        asked.append(Asked(entry, whole.first(entry.limit), whole.sha256))
    return asked


def _score(
    config: EvalConfig, run: RunDir, model: Model, generator: Generator, asked: Asked, latex: LatexProcess
) -> Score:
    items = asked.benchmark.items
    if not model.loaded.is_vision and any(item.picture for item in items):
        raise EvaluationError(
            f"{model.source} is a text model and cannot see the pictures of {asked.config.name}: use a vision model"
        )
    begun = time.monotonic()
    predictions = _predictions(config, run, model, generator, asked, latex)
    grades = {entry.id: Grade(entry.extracted, entry.rule, entry.correct) for entry in predictions}
    summary = RULES[asked.config.kind].summarize(asked.benchmark, grades)
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
        n=len(items),
        n_total=asked.benchmark.num_total,
        whole=summary.whole,
        items_sha256=asked.benchmark.sha256,
        by_category=summary.by_category,
        scorer=SCORER,
        judge=JUDGE,
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


def _predictions(
    config: EvalConfig, run: RunDir, model: Model, generator: Generator, asked: Asked, latex: LatexProcess
) -> list[Prediction]:
    """One per item, in the benchmark's order; those that are already on disk are not generated again."""
    directory = run.evaluation_path(model.role, asked.config.name)
    earlier = (attempt.evaluation_path(model.role, asked.config.name) for attempt in _earlier_attempts(config))
    log = PredictionLog.open(directory, _identity(config, model, generator, asked), earlier)
    grade = RULES[asked.config.kind].grade
    for batch, answers in _generated(config, run, generator, asked, log):
        pairs = zip(batch, answers, strict=True)
        log.append([_prediction(item, answer, grade(item, answer.text, latex)) for item, answer in pairs])
    return [log.done[item.id] for item in asked.benchmark.items]


def _earlier_attempts(config: EvalConfig) -> Iterator[RunDir]:
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


def _generated(
    config: EvalConfig, run: RunDir, generator: Generator, asked: Asked, log: PredictionLog
) -> Iterator[tuple[list[Item], list[Generated]]]:
    """Batches of items not answered yet, longest prompts first, so that memory runs out early or not at all."""
    items = asked.benchmark.items
    missing = sorted((item for item in items if item.id not in log.done), key=_length(config), reverse=True)
    begun = time.monotonic()
    for start in range(0, len(missing), config.batch_size):
        elapsed = time.monotonic() - begun
        progress = Progress(
            phase="evaluating",
            benchmark=asked.config.name,
            items_done=len(items) - len(missing) + start,
            items_total=len(items),
            seconds_remaining=elapsed / start * (len(missing) - start) if start else None,
        )
        run.write_progress(progress)
        batch = missing[start : start + config.batch_size]
        yield batch, generator.answers(batch)
    run.write_progress(
        Progress(
            phase="evaluating",
            benchmark=asked.config.name,
            items_done=len(items),
            items_total=len(items),
            seconds_remaining=0.0,
        )
    )


def _length(config: EvalConfig) -> Any:
    """About how many tokens a prompt has; only the order matters."""

    def length(item: Item) -> float:
        text = len(item.prompt) / 3
        if item.picture is None:
            return text
        try:
            return text + num_visual_tokens(*item.picture.size(), config.pixels)
        except DatasetError:  # counted as a failure when it is asked
            return text

    return length


def _prediction(item: Item, answer: Generated, grade: Grade) -> Prediction:
    return Prediction(
        id=item.id,
        prompt=item.prompt,
        prediction=answer.text,
        extracted=grade.extracted,
        rule=grade.rule,
        answer=item.answer,
        correct=grade.correct,
        finish_reason=answer.finish_reason,
        num_generated_tokens=answer.num_tokens,
        error=answer.error,
    )


def _settings(config: EvalConfig, model: Model) -> dict[str, Any]:
    """Everything that decides an answer beside model, items and pixels."""
    return {
        "max_new_tokens": config.max_new_tokens,
        "temperature": config.temperature,
        "seed": config.seed if config.temperature > 0 else None,
        "repetition_penalty": 1.0,
        "system_prompt": config.system_prompt,
        "precision": str(model.loaded.dtype).removeprefix("torch."),
    }


def _identity(config: EvalConfig, model: Model, generator: Generator, asked: Asked) -> dict[str, Any]:
    """What must be equal for an old prediction to be as good as a new one."""
    return {
        "model_sha256": model.sha256,
        "chat_template_sha256": hashlib.sha256(generator.encoder.template.source.encode()).hexdigest(),
        "benchmark_sha256": asked.file_sha256,
        "scorer": SCORER,
        "generation": _settings(config, model),
        "pixels": config.pixels.model_dump(),
        "image_backend": IMAGE_BACKEND,
    }
