"""GET .../samples: what a model in training answers to rows of its own data, and the pictures of these rows.

The pictures are the canonical dataset's, read when somebody looks: where the file was deleted, they have gone with it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Response

from service import storage
from service.api.dependencies import DatabaseNow, Project
from service.api.runs import merged_samples, sample_steps
from service.api.schemas import ResponseModel
from service.errors import NotFoundError
from service.jobs import store
from service.jobs.database import Database
from service.jobs.phases import Kind
from service.jobs.tables import Attempt, Job
from service.storage import StorageError
from vlm_dft.data.canonical import CanonicalDataset, ImagePart, Message, TextPart
from vlm_dft.errors import BenchmarkError, DatasetError
from vlm_dft.evaluation.items import Picture
from vlm_dft.results import SampleAnswer

router = APIRouter()

AnyStep = Annotated[int | None, Query(ge=0, le=2**53, description="Not given: the newest.")]
Sha256 = Annotated[str, Query(pattern=r"^[0-9a-f]{64}$", description="As image_url of a sample has it.")]


class SampleImage(ResponseModel):
    """One picture of a turn."""

    type: Literal["image"] = "image"
    name: str
    """Its path in the dataset."""
    width: int
    height: int
    image_url: str
    """Path of the picture on this server; 404 once the file that it is from was deleted."""


class SampleTurn(ResponseModel):
    """One turn of a prompt."""

    role: Literal["system", "user", "assistant"]
    content: list[TextPart | SampleImage]


class JobSample(ResponseModel):
    """One row of the data, and what the model answered to it at one step, greedily."""

    object: Literal["job.sample"] = "job.sample"
    step: int
    split: Literal["train", "held_out"]
    row_id: str
    """file:line of the source."""
    prompt: list[SampleTurn]
    """The turns before the last one that is trained."""
    reference: str
    """That turn."""
    answer: str
    num_tokens: int
    """Of the answer, its end token included."""
    finish_reason: Literal["stop", "length", "error"]
    """length: cut at sample_max_new_tokens, or at the model's context. error: the prompt leaves no room there."""
    error: str | None
    attempt: int


class JobSamples(ResponseModel):
    """samples.jsonl over all attempts: each answer once, as its newest attempt gave it."""

    object: Literal["job.samples"] = "job.samples"
    job_id: str
    steps: list[int]
    """At which rows were answered: before the first step, at each probe_every_steps, and at the end."""
    data: list[JobSample]
    """Of one step, in the order of the rows."""


@router.get("/samples")
def job_samples(job_id: str, project: Project, database: DatabaseNow, step: AnyStep = None) -> JobSamples:
    """Answers to the first rows of the held-out file, or of the training file where there is none, at one step."""
    _, attempts = _job(database, project, job_id)
    steps = sample_steps(attempts)
    shown = step if step is not None else max(steps, default=0)
    data = [_sample(job_id, answer, attempt) for answer, attempt in merged_samples(attempts, shown)]
    return JobSamples(job_id=job_id, steps=steps, data=data)


_image: dict[int | str, dict[str, Any]] = {200: {"content": {"image/*": {}}, "description": "The picture."}}


@router.get("/samples/image", response_class=Response, responses=_image)
def sample_image(job_id: str, sha256: Sha256, project: Project, database: DatabaseNow) -> Response:
    """A picture of a sampled row, encoded as the dataset has it."""
    job, attempts = _job(database, project, job_id)
    for answer, _ in merged_samples(attempts, min(sample_steps(attempts), default=0)):
        for message in answer.prompt:
            for part in message.content:
                if isinstance(part, ImagePart) and part.sha256 == sha256:
                    content, media_type = _read(job, answer, part)
                    headers = {"cache-control": "private, max-age=31536000, immutable"}
                    headers["x-content-type-options"] = "nosniff"
                    return Response(content, media_type=media_type, headers=headers)
    raise NotFoundError(f"{job_id} has no sample with this picture", param="sha256", code="image_not_found")


def _job(database: Database, project: str, job_id: str) -> tuple[Job, Sequence[Attempt]]:
    with database.read() as s:
        return store.get_job(s, project, job_id, Kind.FINE_TUNING), store.list_attempts(s, job_id)


def _read(job: Job, answer: SampleAnswer, part: ImagePart) -> tuple[bytes, str]:
    """Bytes and media type. Raises NotFoundError where they are not what was trained on, or not there any more."""
    path = Path(job.config["train"]["dataset" if answer.split == "train" else "validation_dataset"])
    try:
        storage.look(path)
        file = CanonicalDataset.open(path).image_path(part)
        storage.fetch(file)
        picture = Picture(place=answer.row_id, path=file)
        content, media_type = picture.encoded(), picture.media_type()
    except (DatasetError, StorageError, BenchmarkError):
        content, media_type = b"", ""
    if hashlib.sha256(content).hexdigest() != part.sha256:
        message = f"the picture of {answer.row_id} is not kept any more: its file was deleted, or it has changed"
        raise NotFoundError(message, param="sha256", code="image_not_kept")
    return content, media_type


def _sample(job_id: str, answer: SampleAnswer, attempt: int) -> JobSample:
    fields = answer.model_dump(exclude={"prompt", "split", "time"})
    return JobSample(
        **fields,
        split="held_out" if answer.split == "validation" else "train",
        prompt=[_turn(job_id, message) for message in answer.prompt],
        attempt=attempt,
    )


def _turn(job_id: str, message: Message) -> SampleTurn:
    return SampleTurn(role=message.role, content=[_part(job_id, part) for part in message.content])


def _part(job_id: str, part: TextPart | ImagePart) -> TextPart | SampleImage:
    if isinstance(part, TextPart):
        return part
    url = f"/v1/fine_tuning/jobs/{job_id}/samples/image?sha256={part.sha256}"
    return SampleImage(name=part.image, width=part.width, height=part.height, image_url=url)
