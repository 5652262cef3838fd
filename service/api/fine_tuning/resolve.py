"""From a request to a job that can be queued: every name looked up, every number fixed, everything checked.

Raises before anything is written, so that an error never leaves a job behind. Changes nothing itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from service.api.evaluations.catalog import resolve_benchmark, resolve_benchmarks
from service.api.evaluations.requests import BenchmarkChoice, EvaluationPlan
from service.api.evaluations.resolve import generation_settings, need_vision, resolve_judge
from service.api.fine_tuning.lengths import check_lengths
from service.api.fine_tuning.requests import (
    PRIORITIES,
    CreateFineTuningJob,
    DftMethod,
    OpenAIHyperparameters,
    RequestedHyperparameters,
    SupervisedMethod,
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
from vlm_dft.config import AccuracyProbeConfig, EvalConfig, FullConfig, GenerationSettings, RunConfig, TrainConfig
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
    probe = _probe_config(body.evaluation, model, settings)
    train = _train_config(body, method, _hyperparameters(body, method), model, training_file, held_out, probe)
    _check_trainable(train, model, name)
    notes = []
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
        priority=PRIORITIES[body.priority],
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


def _train_config(
    body: CreateFineTuningJob,
    method: SupervisedMethod | DftMethod,
    hyperparameters: RequestedHyperparameters,
    model: ResolvedModel,
    training_file: File,
    held_out: File | None,
    probe: AccuracyProbeConfig | None,
) -> TrainConfig:
    values: dict[str, Any] = hyperparameters.resolved()
    if body.seed is not None:
        values["seed"] = body.seed
    return TrainConfig(
        model=model.source,
        revision=model.revision,
        dataset=_dataset(training_file),
        validation_dataset=_dataset(held_out) if held_out else None,
        objective=method.resolved_objective(),
        adapter=method.adapter,
        freeze=method.freeze,
        pixels=method.pixels,
        accuracy_probe=probe,
        **values,
    )


def _dataset(file: File) -> Path:
    assert file.dataset_path is not None, f"{file.id}: a processed training file has a dataset"
    return Path(file.dataset_path)


def _check_trainable(train: TrainConfig, model: ResolvedModel, method: str) -> None:
    """A full fine-tuning with everything frozen would train nothing."""
    freeze = train.freeze
    vision_frozen = (freeze.vision_tower and freeze.merger) or not model.is_vision
    if isinstance(train.adapter, FullConfig) and freeze.language_model and vision_frozen:
        message = f"{method}.freeze: every part of the model is frozen, nothing is left to train: unfreeze one"
        raise InvalidRequestError(message, param=f"{method}.freeze")


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
    return EvalConfig(
        benchmarks=benchmarks,
        include_base=plan.include_base,
        pixels=plan.pixels or train.pixels,
        judge=resolve_judge(plan.judge, settings, "evaluation.judge"),
        score_cache=settings.scores_dir,
        **generation_settings(plan),
    )


def _record(body: CreateFineTuningJob, training_file: File) -> dict[str, Any]:
    """What is stored as the accepted request, with the data's fingerprint, which outlives the file."""
    given = body.model_dump(mode="json", exclude_unset=True)
    return {**given, "metadata": body.metadata or {}, "data_fingerprint": training_file.fingerprint}
