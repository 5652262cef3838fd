"""POST /v1/fine_tuning/preview: the first rows of a file as the trainer will see them. Changes nothing."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter

from service.api.dependencies import DatabaseNow, Project, RegistryNow, SettingsNow
from service.api.fine_tuning.data import model_and_file
from service.api.fine_tuning.tokenizing import ask
from service.api.schemas import Name, RequestModel, ResponseModel
from vlm_dft.preview_report import PreviewConfig, PreviewReport, PreviewRow, PreviewSettings

router = APIRouter(prefix="/v1/fine_tuning/preview", tags=["fine-tuning"])

_SECONDS = 60.0


class CreatePreview(RequestModel, PreviewSettings):
    """Body of POST /v1/fine_tuning/preview."""

    model: Name
    """Whose chat template and tokenizer are used."""
    training_file: Name
    """A processed file with purpose fine-tune."""


class Preview(ResponseModel):
    """Rows with what is trained of them."""

    object: Literal["fine_tuning.preview"] = "fine_tuning.preview"
    model: str
    training_file: str
    first_row: int
    rows_total: int
    max_length_tokens: int
    data: list[PreviewRow]


@router.post("")
def create_preview(
    body: CreatePreview, project: Project, database: DatabaseNow, settings: SettingsNow, registry: RegistryNow
) -> Preview:
    """Tokenize a few rows with the model's own chat template: what is trained, what pictures become, what fits."""
    model, file, dataset = model_and_file(database, project, registry, body.model, body.training_file)
    config = PreviewConfig(
        model=model.source,
        revision=model.revision,
        dataset=dataset,
        **body.model_dump(include=set(PreviewSettings.model_fields)),
    )
    report = ask(settings, "vlm_dft.preview", config, PreviewReport, seconds=_SECONDS)
    return Preview(
        model=model.name,
        training_file=file.id,
        first_row=body.first_row,
        rows_total=report.rows_total,
        max_length_tokens=report.max_length_tokens,
        data=list(report.rows),
    )
