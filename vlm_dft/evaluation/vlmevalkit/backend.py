"""Benchmarks answered and scored by VLMEvalKit; scores and predictions as the native backend writes them.

Scores that an earlier run found under the same identity are taken from the shared cache. Knows nothing about processes
(``work``) or about how VLMEvalKit's files are read (``outcome``).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from vlm_dft.config import EvalConfig
from vlm_dft.evaluation.answering import Role
from vlm_dft.evaluation.benchmarks import RULES
from vlm_dft.evaluation.contamination import BenchmarkOverlaps, without_overlaps
from vlm_dft.evaluation.grading import Grade, Summary
from vlm_dft.evaluation.items import Item
from vlm_dft.evaluation.predictions import PREDICTIONS_NAME, SCORE_NAME, Prediction, PredictionLog
from vlm_dft.evaluation.score_cache import ScoreCache
from vlm_dft.evaluation.vlmevalkit import outcome
from vlm_dft.evaluation.vlmevalkit.answer_log import Answer
from vlm_dft.evaluation.vlmevalkit.installation import Installation
from vlm_dft.evaluation.vlmevalkit.model import read_facts
from vlm_dft.evaluation.vlmevalkit.work import Asked, Model, Work
from vlm_dft.model_files import locate, model_sha256
from vlm_dft.results import Progress, Score
from vlm_dft.run_dir import RunDir, write_json


def evaluate(
    config: EvalConfig,
    run: RunDir,
    installation: Installation,
    asked: Sequence[Asked],
    overlaps: Mapping[str, BenchmarkOverlaps],
    *,
    role: Role,
    source: str,
    revision: str | None,
) -> list[Score]:
    """One score per benchmark, in order. Writes what the native backend writes, and VLMEvalKit's own files beside it.

    overlaps: with the training data, by benchmark.
    Raises EvaluationError, BenchmarkError, ModelError, OutOfMemoryError, DiskFullError.
    """
    run.write_progress(Progress(phase="loading_model"))
    path = locate(source, revision)
    model = Model(role, source, path, model_sha256(path))
    cache = ScoreCache(config.score_cache) if config.score_cache else None
    work = Work(config, run, installation, asked, model)
    known = {entry.config.name: cache.find(_of_cache(work, entry)) for entry in asked} if cache else {}
    missing = [entry for entry in asked if known.get(entry.config.name) is None]
    seconds = 0.0
    if missing:
        work = Work(config, run, installation, missing, model)
        seconds = _run(work) / len(missing)
    scores = []
    for entry in asked:
        if (cached := known.get(entry.config.name)) is not None:
            score, predictions = cached.score.model_copy(update={"from_cache": True}), cached.predictions
        else:
            predictions = predictions_of(work, entry)
            score = score_of(work, entry, predictions, seconds)
            if cache:
                cache.put(_of_cache(work, entry), score, predictions)
        overlapping = overlaps.get(entry.config.name)
        scores.append(written(work, entry, score, predictions, overlapping))
    return scores


def predictions_of(work: Work, entry: Asked) -> list[Prediction]:
    """Every answer with VLMEvalKit's verdict, in the benchmark's order. Raises EvaluationError."""
    grades = outcome.read_grades(work.newest_run(), entry.table, work.judge_file_name)
    answers = work.answers_of(entry)
    return [_prediction(item, answers[index], grades[item.id]) for index, item in entry.table.rows.items()]


def score_of(work: Work, entry: Asked, predictions: Sequence[Prediction], seconds: float) -> Score:
    """The score record; numbers as the benchmark's own rules sum up VLMEvalKit's verdicts."""
    config, directory = work.config, work.run.evaluation_path(work.model.role, entry.config.name)
    summary = _summary(entry, predictions)
    facts = read_facts(work.answers)
    return Score(
        benchmark=entry.config.name,
        kind=entry.config.kind,
        model=work.model.source,
        model_role=work.model.role,
        model_sha256=work.model.sha256,
        metric=summary.metric,
        value=summary.estimate.value,
        numerator=summary.estimate.numerator,
        denominator=summary.estimate.denominator,
        standard_error=summary.estimate.standard_error,
        n=len(predictions),
        n_total=entry.chosen.num_total,
        whole=summary.whole,
        items_sha256=entry.chosen.sha256,
        by_category=summary.by_category,
        scorer=work.installation.scorer,
        judge=work.judge_name,
        judged=sum(prediction.rule == "judge" for prediction in predictions),
        prompt=config.prompt,
        generation={
            "max_new_tokens": config.max_new_tokens,
            "temperature": config.temperature,
            "samples_per_item": 1,
            "seed": config.seed if config.temperature > 0 else None,
            "repetition_penalty": 1.0,
            "system_prompt": config.system_prompt,
            "precision": facts["precision"],
            "batch_size": config.batch_size,
        },
        pixels=config.pixels.model_dump(),
        image_backend=facts["image_backend"],
        failure_rate=sum(prediction.failed for prediction in predictions) / len(predictions),
        extraction_rate=sum(prediction.extracted is not None for prediction in predictions) / len(predictions),
        predictions=str((directory / PREDICTIONS_NAME).relative_to(work.run.path)),
        wall_seconds=seconds,
    )


def written(
    work: Work,
    entry: Asked,
    score: Score,
    predictions: Sequence[Prediction],
    overlapping: BenchmarkOverlaps | None = None,
) -> Score:
    """score as it is called in this run, with what is of this run alone, written beside its predictions."""
    directory = work.run.evaluation_path(work.model.role, entry.config.name)
    names: dict[str, Any] = {
        "benchmark": entry.config.name,
        "model": work.model.source,
        "model_role": work.model.role,
        "predictions": str((directory / PREDICTIONS_NAME).relative_to(work.run.path)),
    }
    PredictionLog.open(directory, work.identity(entry)).replace(predictions)
    if overlapping is not None:
        names |= without_overlaps(entry.chosen, _summary(entry, predictions), overlapping)
    named = score.model_copy(update=names)
    write_json(directory / SCORE_NAME, named)
    return named


def _summary(entry: Asked, predictions: Sequence[Prediction]) -> Summary:
    grades = {prediction.id: prediction.grade for prediction in predictions}
    return RULES[entry.config.kind].summarize(entry.chosen, grades)


def _run(work: Work) -> float:
    """Everything that VLMEvalKit does; the seconds it took."""
    begun = time.monotonic()
    work.prepare()
    work.infer()
    work.score()
    return time.monotonic() - begun


def _of_cache(work: Work, entry: Asked) -> dict[str, Any]:
    return {**work.identity(entry), "items_sha256": entry.chosen.sha256}


def _prediction(item: Item, answer: Answer, grade: Grade) -> Prediction:
    return Prediction(
        id=item.id,
        prompt=answer.prompt,
        prediction=answer.text,
        extracted=grade.extracted,
        rule=grade.rule,
        answer=item.answer,
        correct=grade.correct,
        finish_reason=answer.finish_reason,
        num_generated_tokens=answer.num_tokens,
        error=answer.error,
    )
