"""How a fine-tuning job, its events and its checkpoints are shown. Reads rows; changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from service.api.fine_tuning.objective_options import shown_options
from service.api.fine_tuning.requests import BASE_LEARNING_RATE, PRIORITIES, TrainingOptions
from service.api.fine_tuning.responses import (
    FineTuningCheckpoint,
    FineTuningJob,
    FineTuningJobEvent,
    JobAttempt,
    MethodShown,
    OpenAIHyperparametersShown,
)
from service.api.jobs import (
    estimated_finish,
    job_error,
    progress_state,
    queue_state,
    whole,
    without_attempt_paths,
)
from service.jobs.phases import Phase, openai_status
from service.jobs.store import Places
from service.jobs.tables import Attempt, Checkpoint, Job, JobEvent
from service.settings import Settings
from vlm_dft.config import Hyperparameters, TrainConfig

_PRIORITY_NAMES: dict[int, Any] = {value: name for name, value in PRIORITIES.items()}
_DEFAULTS = TrainConfig(model="", dataset=Path()).model_dump(mode="json")
_OPENAI_CHECKPOINT_METRICS = {
    "train_loss": "nll",
    "train_mean_token_accuracy": "token_accuracy",
    "full_valid_loss": "valid_nll",
    "full_valid_mean_token_accuracy": "valid_token_accuracy",
}


def show_job(s: Session, job: Job, settings: Settings, places: Places | None = None) -> FineTuningJob:
    """The job as clients see it. places: those of the GPU queue in this transaction, where many jobs are shown."""
    train = _resolved(job.config["train"])
    result = job.result or {}
    assert job.model is not None, f"{job.id}: submit wrote it"
    assert job.training_file is not None, f"{job.id}: submit wrote it"
    return FineTuningJob(
        id=job.id,
        created_at=int(job.created_at),
        finished_at=whole(job.finished_at),
        model=job.model,
        fine_tuned_model=job.fine_tuned_model,
        organization_id=settings.organization,
        result_files=[],
        status=openai_status(Phase(job.phase)),
        training_file=job.training_file,
        validation_file=job.validation_file,
        hyperparameters=_openai_hyperparameters(train),
        seed=train["seed"],
        trained_tokens=job.trained_tokens,
        error=job_error(job),
        estimated_finish=estimated_finish(job),
        integrations=[],
        metadata=job.request.get("metadata") or {},
        method=_method(train),
        phase=job.phase,
        attempt=job.attempt,
        started_at=whole(job.started_at),
        suffix=job.suffix,
        priority=_PRIORITY_NAMES.get(job.priority, job.priority),
        deadline_at=whole(job.deadline_at),
        cloned_from=job.request.get("cloned_from"),
        objective=train["objective"]["name"],
        queue=queue_state(s, job, settings, places),
        progress=progress_state(job),
        resolved_config=without_attempt_paths(job.config),
        data_fingerprint=job.request.get("data_fingerprint"),
        result=result.get("train"),
        scores=result.get("scores") or [],
        evaluation_error=result.get("evaluation_error"),
    )


def _openai_hyperparameters(train: dict[str, Any]) -> OpenAIHyperparametersShown:
    return OpenAIHyperparametersShown(
        n_epochs=train["n_epochs"],
        batch_size=train["batch_size"],
        # Rounded to what a double can tell apart after the division: 5e-5 x 0.3 is shown as 0.3.
        learning_rate_multiplier=float(f"{train['learning_rate'] / BASE_LEARNING_RATE:.12g}"),
    )


def _resolved(train: dict[str, Any]) -> dict[str, Any]:
    """A stored training, and the trainer's default for each field that is younger than the job: what a worker takes."""
    return _DEFAULTS | train


def _method(train: dict[str, Any]) -> MethodShown:
    """OpenAI's supervised form whatever was asked: typed clients refuse any other type."""
    hyperparameters = {name: train[name] for name in Hyperparameters.model_fields}
    hyperparameters |= _openai_hyperparameters(train).model_dump()
    supervised = {"objective": train["objective"]["name"], "hyperparameters": hyperparameters}
    supervised |= shown_options(train["objective"])
    supervised |= {name: train[name] for name in ("adapter", "freeze", "pixels")}
    supervised["training"] = {name: bool(train[name]) for name in TrainingOptions.model_fields}
    return MethodShown(type="supervised", supervised=supervised)


def show_event(event: JobEvent) -> FineTuningJobEvent:
    return FineTuningJobEvent.model_validate(
        {
            "id": event.id,
            "created_at": int(event.created_at),
            "level": event.level,
            "message": event.message,
            "type": event.type,
            "data": event.data,
            "seq": event.seq,
        }
    )


def show_checkpoint(checkpoint: Checkpoint) -> FineTuningCheckpoint:
    """OpenAI's metric names are added where the trainer measured the same thing under ours."""
    ours = checkpoint.metrics
    openai = {theirs: ours[name] for theirs, name in _OPENAI_CHECKPOINT_METRICS.items() if name in ours}
    return FineTuningCheckpoint(
        id=checkpoint.id,
        created_at=int(checkpoint.created_at),
        fine_tuned_model_checkpoint=checkpoint.name,
        fine_tuning_job_id=checkpoint.job_id,
        step_number=checkpoint.step,
        metrics={"step": checkpoint.step, **openai, **ours},
    )


def show_attempt(attempt: Attempt) -> JobAttempt:
    return JobAttempt(
        id=f"{attempt.job_id}/attempt-{attempt.attempt}",
        attempt=attempt.attempt,
        worker=attempt.worker,
        device=attempt.device,
        started_at=int(attempt.started_at),
        ended_at=whole(attempt.ended_at),
        exit_reason=attempt.exit_reason,
        resumed_from_step=attempt.resumed_from_step,
    )
