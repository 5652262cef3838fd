"""From a request to an evaluation that can be queued. Raises before anything is written; changes nothing itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy.orm import Session

from service.api.evaluations.catalog import resolve_benchmarks
from service.api.evaluations.requests import CreateEvaluation
from service.api.once import Resolved
from service.errors import InvalidRequestError
from service.jobs.database import Database
from service.jobs.models import ModelRegistry, ResolvedModel
from service.jobs.phases import Kind
from service.jobs.store import NewJob
from service.jobs.tables import Job
from service.settings import Settings
from vlm_dft.config import BenchmarkConfig, EvalConfig, GenerationSettings, JudgeConfig, PixelConfig, RunConfig
from vlm_dft.evaluation.benchmarks import WITH_PICTURES
from vlm_dft.evaluation.vlmevalkit.tables import refusal


def resolve_evaluation(
    database: Database, project: str, body: CreateEvaluation, settings: Settings, registry: ModelRegistry
) -> Resolved:
    """The evaluation that the request asks for. Raises InvalidRequestError."""
    with database.read() as s:
        model = registry.resolve(s, project, body.model)
        benchmarks = resolve_benchmarks(settings.resolved_benchmarks, body.benchmarks, body.limit, "benchmarks")
        need_vision(model, benchmarks, "model")
        trained = _training(s, project, registry, model)
        pixels = body.pixels or (PixelConfig(**trained["pixels"]) if trained else PixelConfig())
    config = EvalConfig(
        model=model.source,
        revision=model.revision,
        benchmarks=benchmarks,
        pixels=pixels,
        judge=resolve_judge(body.judge, settings, "judge"),
        score_cache=settings.scores_dir,
        score_cache_gib=settings.scores_gib,
        training_dataset=trained["dataset"] if trained else None,
        **generation_settings(body),
    )
    check_backend(config, "backend")
    new = NewJob(
        project=project,
        kind=Kind.EVALUATION,
        request={**body.model_dump(mode="json", exclude_unset=True), "metadata": body.metadata or {}},
        config=RunConfig(run_id="unsubmitted", evaluation=config),
        runs_dir=settings.runs_dir,
        model=model.name,
        root=model.root,
        seed=config.seed,
        metadata=body.metadata or {},
    )
    return Resolved(new)


def generation_settings(body: GenerationSettings) -> dict[str, Any]:
    """The generation's fields alone."""
    return body.model_dump(include=set(GenerationSettings.model_fields))


def resolve_judge(wanted: bool, settings: Settings, param: str) -> JudgeConfig | None:
    """The server's judge. Raises InvalidRequestError where it has none."""
    if not wanted:
        return None
    if settings.judge_base_url is None or settings.judge_model is None:
        message = (
            f"{param}: this server has no judge: set VLM_DFT_JUDGE_BASE_URL and VLM_DFT_JUDGE_MODEL, or leave it out"
        )
        raise InvalidRequestError(message, param=param, code="judge_not_available")
    return JudgeConfig(base_url=settings.judge_base_url, model=settings.judge_model)


def check_backend(config: EvalConfig, param: str) -> None:
    """Raises InvalidRequestError where VLMEvalKit is asked for and could not score that anywhere.

    Whether it is installed is known where the job runs: the job then fails before it begins, and says what is missing.
    """
    if config.backend != "vlmevalkit":
        return
    for entry in config.benchmarks:
        if reason := refusal(config, entry):
            message = f"{param}: {entry.name}: {reason}; backend native can, and auto takes what can"
            raise InvalidRequestError(message, param=param, code="backend_not_possible")


def need_vision(model: ResolvedModel, benchmarks: Sequence[BenchmarkConfig], param: str) -> None:
    """Raises InvalidRequestError where a text model would have to see. A custom benchmark shows when it is read."""
    shown = next((benchmark.name for benchmark in benchmarks if benchmark.kind in WITH_PICTURES), None)
    if shown is not None and not model.is_vision:
        message = f"{param}: {shown} shows images, and {model.name} is a text model: choose a vision model"
        raise InvalidRequestError(message, param=param, code="model_without_vision")


def _training(s: Session, project: str, registry: ModelRegistry, model: ResolvedModel) -> dict[str, Any] | None:
    """How a fine-tuned model or a checkpoint was trained; None for a base model."""
    job_id = registry.get(s, project, model.name).job_id
    job = s.get(Job, job_id) if job_id else None
    return job.config["train"] if job else None
