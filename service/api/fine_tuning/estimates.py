"""POST /v1/fine_tuning/estimates: a job's body in, what it would take out. Nothing is queued."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter

from service.api.dependencies import DatabaseNow, Project, RegistryNow, SettingsNow
from service.api.fine_tuning import estimating
from service.api.fine_tuning.data import model_and_file
from service.api.fine_tuning.requests import CreateFineTuningJob
from service.api.fine_tuning.resolve import resolve_job
from service.api.fine_tuning.tokenizing import ask
from service.api.schemas import ResponseModel
from service.errors import InvalidRequestError
from service.jobs.models import ResolvedModel
from service.settings import Settings
from vlm_dft.config import TrainConfig
from vlm_dft.counting_report import CountingConfig, CountingReport
from vlm_dft.data.canonical import CanonicalDataset
from vlm_dft.errors import DatasetError, ModelError
from vlm_dft.estimate_memory import MemoryReckoning
from vlm_dft.estimate_report import (
    DeviceFit,
    MemoryEstimate,
    PixelChoice,
    QueueEstimate,
    RowsEstimate,
    StepsEstimate,
    TimeEstimate,
    TokensEstimate,
)
from vlm_dft.estimate_rows import Counted, RowsReckoning, counted_by_validation, counted_now
from vlm_dft.model_files import locate
from vlm_dft.model_shape import read_shape

router = APIRouter(prefix="/v1/fine_tuning/estimates", tags=["fine-tuning"])

_COUNTING_SECONDS = 120.0


class Estimate(ResponseModel):
    """What a training would take. Whatever cannot be known is null, and its basis says why."""

    object: Literal["fine_tuning.estimate"] = "fine_tuning.estimate"
    model: str
    training_file: str
    rows: RowsEstimate
    tokens: TokensEstimate | None
    """Null when no row fits."""
    steps: StepsEstimate
    memory: MemoryEstimate | None
    """Null when no row fits, and where the model's files are not on this machine yet; see notes."""
    devices: list[DeviceFit]
    """Of the workers that are alive."""
    time: TimeEstimate
    queue: QueueEstimate
    pixels: list[PixelChoice]
    """What other pixel limits would cost; empty without images."""
    notes: list[str]
    resolved_config: dict[str, Any]


@router.post("")
def create_estimate(
    body: CreateFineTuningJob, project: Project, database: DatabaseNow, settings: SettingsNow, registry: RegistryNow
) -> Estimate:
    """Reckon tokens, steps, memory, time and waiting of the job that this body would make."""
    model, file, path = model_and_file(database, project, registry, body.model, body.training_file)
    new = resolve_job(database, project, _tolerating_long_rows(body), settings, registry).new
    assert new.config.train is not None, "a fine-tuning trains"
    train = new.config.train.model_copy(update={"on_overlong": _on_overlong(body)})
    try:
        reckoning = RowsReckoning(_counted(CanonicalDataset.open(path), model, settings), train)
    except DatasetError as error:
        raise InvalidRequestError(error.message, param="training_file", code=error.code) from None
    steps = reckoning.steps
    with database.read() as s:
        workers = estimating.alive_workers(s, settings.lease_seconds)
        time = estimating.time_estimate(s, project, model.name, train, steps.input_tokens)
        queue = estimating.queue_estimate(s, workers, new.priority)
    notes = _warm_up(train, steps.total)
    memory = _memory(model, train, reckoning, on_gpu=estimating.on_gpu(workers), notes=notes)
    return Estimate(
        model=model.name,
        training_file=file.id,
        rows=reckoning.rows,
        tokens=reckoning.tokens,
        steps=steps,
        memory=memory,
        devices=list(estimating.device_fits(workers, memory.total_gib if memory else None)),
        time=time,
        queue=queue,
        pixels=list(reckoning.pixel_choices()),
        notes=notes,
        resolved_config=train.model_dump(mode="json", exclude_none=True),
    )


def _warm_up(train: TrainConfig, total_steps: int) -> list[str]:
    """The first step of a warm-up has the learning rate 0, so that a training of one step would change nothing."""
    if total_steps != 1 or not train.warmup_ratio:
        return []
    return ["learning rate: the only step is the warm-up's first, at 0: set warmup_ratio to 0, or train for more steps"]


def _on_overlong(body: CreateFineTuningJob) -> Literal["error", "drop"]:
    return body.method.chosen.hyperparameters.on_overlong if body.method is not None else "error"


def _tolerating_long_rows(body: CreateFineTuningJob) -> CreateFineTuningJob:
    """The same request, resolved with rows that do not fit: an estimate counts them, where a job is refused."""
    document = body.model_dump(mode="json", exclude_unset=True)
    method = document.setdefault("method", {"type": "supervised"})
    options = method.get(method["type"]) or {}
    numbers = options.get("hyperparameters") or {}
    if not numbers:  # given in both places they are refused, as the job's would be
        numbers = document.pop("hyperparameters", None) or {}
    method[method["type"]] = {**options, "hyperparameters": {**numbers, "on_overlong": "drop"}}
    return CreateFineTuningJob.model_validate(document)


def _counted(dataset: CanonicalDataset, model: ResolvedModel, settings: Settings) -> Counted:
    """Text tokens by this model's tokenizer: those of validation where it counted with the same one."""
    if model.tokenizer_sha256 is not None and dataset.manifest.tokenizer_sha256 == model.tokenizer_sha256:
        return counted_by_validation(dataset)
    question = CountingConfig(model=model.source, revision=model.revision, dataset=dataset.path)
    found = ask(settings, "vlm_dft.counting", question, CountingReport, seconds=_COUNTING_SECONDS)
    return counted_now(dataset, found.text_tokens, found.supervised_tokens, found.refused)


def _memory(
    model: ResolvedModel, train: TrainConfig, reckoning: RowsReckoning, *, on_gpu: bool, notes: list[str]
) -> MemoryEstimate | None:
    tokens, visual_tokens = reckoning.largest_micro_batch()
    if not tokens:
        return None
    if model.tokenizer_sha256 is None:
        notes.append(f"memory: {model.name} is fetched from the hub at its first use; its size is not known before")
        return None
    try:
        shape = read_shape(locate(model.source))
    except ModelError as error:
        notes.append(f"memory: {error.message}")
        return None
    return MemoryReckoning(shape, train, on_gpu=on_gpu).estimate(tokens, visual_tokens)
