"""Fine-tuning objects as OpenAI's clients parse them, strictly too; our own fields come after OpenAI's."""

from __future__ import annotations

from typing import Any, Literal

from service.api.fine_tuning.requests import Priority
from service.api.jobs import JobError, ProgressState, QueueState
from service.api.schemas import ResponseModel
from vlm_dft.results import ErrorRecord, Score, TrainResult


class OpenAIHyperparametersShown(ResponseModel):
    """The three that OpenAI has, as resolved."""

    n_epochs: int
    batch_size: int
    learning_rate_multiplier: float
    """Learning rate over 5e-5."""


class MethodShown(ResponseModel):
    """How the job trains, fully resolved."""

    type: Literal["supervised"]
    supervised: dict[str, Any]
    """objective and its options, hyperparameters, adapter, freeze, pixels, training."""


class FineTuningJob(ResponseModel):
    """A fine-tuning job."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    model: str
    """The model that is tuned."""
    fine_tuned_model: str | None
    organization_id: str
    result_files: list[str]
    status: str
    """validating_files, queued, running, succeeded, failed or cancelled."""
    training_file: str
    validation_file: str | None
    hyperparameters: OpenAIHyperparametersShown
    seed: int
    trained_tokens: int | None
    """Supervised tokens, each counted once however often the job was interrupted."""
    error: JobError | None
    estimated_finish: int | None
    integrations: list[Any]
    metadata: dict[str, str]
    method: MethodShown

    phase: str
    """Finer than status: created, queued, recovering, starting, loading_model, running, checkpointing, exporting,
    evaluating, pausing, paused, cancelling, succeeded, failed, cancelled."""
    attempt: int
    """1 for the first run; higher after a lost worker or a drain."""
    started_at: int | None
    suffix: str | None
    priority: Priority
    deadline_at: int | None
    """When the job fails with code timeout unless it has ended; null: it has no deadline, or was not started yet."""
    cloned_from: str | None
    objective: str
    queue: QueueState | None
    progress: ProgressState | None
    resolved_config: dict[str, Any]
    """What the trainer gets, nothing left to defaults."""
    data_fingerprint: str | None
    """Of the training file's canonical rows, in order."""
    result: TrainResult | None
    scores: list[Score]
    evaluation_error: ErrorRecord | None
    """Why the evaluation failed; that does not fail the training."""


class FineTuningJobEvent(ResponseModel):
    """One event."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any] | None
    seq: int
    """1, 2, 3, ... without gaps; the id of the event stream."""


class FineTuningCheckpoint(ResponseModel):
    """A complete checkpoint, usable as a model by its name."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: dict[str, Any]
    """OpenAI's names where the number is the same thing (train_loss is the raw NLL), and ours."""


class JobAttempt(ResponseModel):
    """One run of a job on one worker."""

    id: str
    object: Literal["job.attempt"] = "job.attempt"
    attempt: int
    worker: str
    device: str
    started_at: int
    ended_at: int | None
    exit_reason: str | None
    resumed_from_step: int | None


class JobMetrics(ResponseModel):
    """metrics.jsonl over all attempts: each step once, as its newest attempt measured it."""

    object: Literal["job.metrics"] = "job.metrics"
    job_id: str
    data: list[dict[str, Any]]
    """By step; vlm_dft.results.StepMetrics, ValidationMetrics and the attempt. With resolution a point
    over several steps has the last step, first_step, num_steps, and objects min and max beside its means."""


class JobHistogram(ResponseModel):
    """How probable the targets of a fixed set of rows were at one step (Figure 2 of the DFT paper)."""

    step: int
    split: Literal["train", "held_out"]
    part: Literal["reasoning", "answer", "all"]
    """reasoning: from <think> to </think>. answer: every other supervised token. all: both."""
    bin_edges: list[float]
    """One more than counts: 0, 0.05, ... 1. A bin holds its lower edge, the last one its upper edge too."""
    counts: list[int]
    """Tokens whose probability lies in each bin."""
    num_tokens: int
    """Sum of counts."""
    num_rows: int
    attempt: int


class JobHistograms(ResponseModel):
    """histograms.jsonl over all attempts: each measurement once, as its newest attempt made it."""

    object: Literal["job.histograms"] = "job.histograms"
    job_id: str
    data: list[JobHistogram]
    """By step, split and part: before the first step, at each probe_every_steps, and at the end."""


class JobLog(ResponseModel):
    """The end of what the trainer process printed."""

    object: Literal["job.log"] = "job.log"
    job_id: str
    attempt: int | None
    text: str
