"""From a request to a job that can be queued: every name looked up, every number fixed, everything checked.

Raises before anything is written, so that an error never leaves a job behind. Changes nothing itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError
from sqlalchemy.orm import Session

from service.api.evaluations.catalog import resolve_benchmark, resolve_benchmarks
from service.api.evaluations.requests import BenchmarkChoice, EvaluationPlan
from service.api.evaluations.resolve import check_backend, generation_settings, need_vision, resolve_judge
from service.api.fine_tuning.contradictions import check_training
from service.api.fine_tuning.lengths import check_lengths
from service.api.fine_tuning.requests import (
    CreateFineTuningJob,
    DftMethod,
    OpenAIHyperparameters,
    RequestedHyperparameters,
    SupervisedMethod,
    TrainingOptions,
    ranked,
)
from service.api.once import Resolved
from service.errors import InvalidRequestError
from service.jobs.database import Database
from service.jobs.files import training_ready_file
from service.jobs.models import ModelRegistry, ResolvedModel
from service.jobs.phases import Kind
from service.jobs.store import NewJob
from service.jobs.tables import File
from service.settings import Settings
from vlm_dft.config import AccuracyProbeConfig, CacheConfig, EvalConfig, GenerationSettings, RunConfig, TrainConfig
from vlm_dft.evaluation.provision import find_benchmarks


def resolve_job(
    database: Database, project: str, body: CreateFineTuningJob, settings: Settings, registry: ModelRegistry
) -> Resolved:
    """The job that the request asks for. Raises InvalidRequestError or FileNotReadyError."""
    with database.read() as s:
        model = registry.resolve(s, project, body.model)
        training_file = training_ready_file(s, project, body.training_file, "training_file")
        held_out = _held_out(s, project, body.validation_file)
    method, name = _method(body)
    hyperparameters = _hyperparameters(body, method)
    unasked: dict[str, Any] = {}
    notes: list[str | None] = []
    if method.training.fsdp and "sample_rows" not in hyperparameters.model_fields_set:
        unasked["sample_rows"] = 0
        notes.append("No rows are answered during this training: with fsdp no process has the whole model")
    probe = _probe_config(body.evaluation, model, settings)
    train = _train_config(
        name,
        **hyperparameters.resolved() | unasked | ({} if body.seed is None else {"seed": body.seed}),
        **_caches(method.training, settings),
        model=model.source,
        revision=model.revision,
        dataset=_dataset(training_file),
        validation_dataset=_dataset(held_out) if held_out else None,
        objective=method.resolved_objective(),
        adapter=method.adapter,
        freeze=method.freeze,
        pixels=method.pixels,
        accuracy_probe=probe,
    )
    check_training(train, model, name)
    for file, param in ((training_file, "training_file"), (held_out, "validation_file")):
        if file is not None:
            _check_vision(file, model, param)
            notes.append(check_lengths(file, train, model, param))
    evaluation = _eval_config(body.evaluation, train, model, settings) if body.evaluation else None
    new = NewJob(
        project=project,
        kind=Kind.FINE_TUNING,
        request=_record(body, training_file),
        config=RunConfig(run_id="unsubmitted", train=train, evaluation=evaluation),
        runs_dir=settings.runs_dir,
        model=model.name,
        root=model.root,
        training_file=training_file.id,
        validation_file=held_out.id if held_out else None,
        suffix=body.suffix,
        seed=train.seed,
        priority=ranked(body.priority),
        auto_start=body.auto_start,
        deadline_seconds=body.deadline_seconds,
        metadata=body.metadata or {},
    )
    return Resolved(new, tuple(note for note in notes if note))


def _held_out(s: Session, project: str, file_id: str | None) -> File | None:
    return None if file_id is None else training_ready_file(s, project, file_id, "validation_file")


def _method(body: CreateFineTuningJob) -> tuple[SupervisedMethod | DftMethod, str]:
    """The method, and its place in the request for error messages."""
    if body.method is None:
        return SupervisedMethod(), "method.supervised"
    return body.method.chosen, f"method.{body.method.type}"


def _hyperparameters(body: CreateFineTuningJob, method: SupervisedMethod | DftMethod) -> RequestedHyperparameters:
    old: OpenAIHyperparameters | None = body.hyperparameters
    if old is None or not old.model_fields_set:
        return method.hyperparameters
    if method.hyperparameters.model_fields_set:
        message = "hyperparameters: method has hyperparameters too: give them there only, this place is deprecated"
        raise InvalidRequestError(message, param="hyperparameters")
    return old


def _train_config(method: str, **values: Any) -> TrainConfig:
    """Raises InvalidRequestError for settings that contradict each other, in the trainer's own words."""
    try:
        return TrainConfig(**values)
    except ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise InvalidRequestError(f"{method}: {message}", param=method) from None


def _caches(asked: TrainingOptions, settings: Settings) -> dict[str, Any]:
    """The trainer's fields: both caches of images share one directory and its budget."""
    cache = CacheConfig(directory=settings.cache_dir / "images", max_gib=settings.cache_gib)
    return {
        "reference_cache": CacheConfig(directory=settings.cache_dir / "reference", max_gib=settings.cache_gib),
        "patch_cache": cache if asked.patch_cache else None,
        "vision_cache": cache if asked.vision_cache else None,
        "compile": asked.compile,
        "fsdp": asked.fsdp,
    }


def _dataset(file: File) -> Path:
    assert file.dataset_path is not None, f"{file.id}: a processed training file has a dataset"
    return Path(file.dataset_path)


def _check_vision(file: File, model: ResolvedModel, param: str) -> None:
    images = (file.validation_report or {}).get("images", 0)
    if images and not model.is_vision:
        message = f"{param}: {file.id} has {images} images, but {model.name} is a text model: choose a vision model"
        raise InvalidRequestError(message, param=param, code="model_without_vision")


def _probe_config(plan: EvaluationPlan | None, model: ResolvedModel, settings: Settings) -> AccuracyProbeConfig | None:
    if plan is None or plan.probe is None:
        return None
    probe, param = plan.probe, "evaluation.probe.benchmark"
    directory = settings.resolved_benchmarks
    choice = BenchmarkChoice(name=probe.benchmark)
    benchmark = resolve_benchmark(find_benchmarks(directory), directory, choice, probe.limit, param)
    need_vision(model, [benchmark], param)
    return AccuracyProbeConfig(
        benchmark=benchmark,
        every_steps=probe.every_steps,
        patience=probe.patience,
        generation=GenerationSettings(prompt=probe.prompt, max_new_tokens=probe.max_new_tokens),
    )


def _eval_config(plan: EvaluationPlan, train: TrainConfig, model: ResolvedModel, settings: Settings) -> EvalConfig:
    param = "evaluation.benchmarks"
    benchmarks = resolve_benchmarks(settings.resolved_benchmarks, plan.benchmarks, plan.limit, param)
    need_vision(model, benchmarks, param)
    config = EvalConfig(
        benchmarks=benchmarks,
        include_base=plan.include_base,
        pixels=plan.pixels or train.pixels,
        judge=resolve_judge(plan.judge, settings, "evaluation.judge"),
        score_cache=settings.scores_dir,
        score_cache_gib=settings.scores_gib,
        **generation_settings(plan),
    )
    check_backend(config, "evaluation.backend")
    return config


def _record(body: CreateFineTuningJob, training_file: File) -> dict[str, Any]:
    """What is stored as the accepted request, with the data's fingerprint, which outlives the file."""
    given = body.model_dump(mode="json", exclude_unset=True)
    return {**given, "metadata": body.metadata or {}, "data_fingerprint": training_file.fingerprint}
