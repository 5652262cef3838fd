"""The model and the processed file that a request names, for what looks at data without training on it."""

from __future__ import annotations

from pathlib import Path

from service import storage
from service.errors import InvalidRequestError
from service.jobs.database import Database
from service.jobs.files import training_ready_file
from service.jobs.models import ModelRegistry, ResolvedModel
from service.jobs.tables import File


def model_and_file(
    database: Database, project: str, registry: ModelRegistry, model: str, training_file: str
) -> tuple[ResolvedModel, File, Path]:
    """Both, and the file's canonical dataset. Raises InvalidRequestError or FileNotReadyError."""
    with database.read() as s:
        resolved = registry.resolve(s, project, model)
        file = training_ready_file(s, project, training_file, "training_file")
    assert file.dataset_path is not None, f"{file.id}: a processed training file has a dataset"
    storage.look(Path(file.dataset_path))
    return resolved, file, Path(file.dataset_path)


def need_sight(model: ResolvedModel, file: File) -> None:
    """Raises InvalidRequestError where a text model would have to see."""
    images = (file.validation_report or {}).get("images", 0)
    if images and not model.is_vision:
        message = (
            f"training_file: {file.id} has {images} images, but {model.name} is a text model: choose a vision model"
        )
        raise InvalidRequestError(message, param="training_file", code="model_without_vision")
