"""Which models there are, by public name: base directories, the hub's allow-list, fine-tuned models, checkpoints.

A base directory is a model when it holds a config.json; whether it can be trained is the trainer's business. Hub models
are named by slash-free aliases, because ft: names are built from them and proxies dislike encoded slashes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from sqlalchemy import select
from sqlalchemy.orm import Session

from service import storage
from service.errors import InvalidRequestError, InvalidStateError, NotFoundError
from service.jobs.database import now
from service.jobs.tables import Checkpoint, Job, Model
from service.settings import Settings
from vlm_dft.data.tokens import tokenizer_sha256

Source = Literal["base", "hub", "tuned", "checkpoint"]
VISION_MODEL_TYPES: Final = frozenset({"qwen2_5_vl"})
CONFIG_NAMES: Final = ("config.json", "adapter_config.json")

HUB_MODELS: Final = {
    "Qwen/Qwen2.5-VL-3B-Instruct": "66285546d2b821cf421d4f5eb2576359d3770cd3",
    "Qwen/Qwen2.5-VL-7B-Instruct": "cc594898137f460bfe9f0759e9844b3ce807cfb5",
    "Qwen/Qwen2.5-Math-1.5B": "4a83ca6e4526a4f2da3aa259ec36c259f66b2ab2",
    "Qwen/Qwen2.5-Math-7B": "b101308fe89651ea5ce025f25317fea6fc07e96e",
    "Qwen/Qwen2.5-0.5B": "060db6499f32faf8b98477b0a26969ef7d8b9987",
    "Qwen/Qwen2.5-0.5B-Instruct": "7ae557604adf67be50417f59c2c2f167def9a775",
    "Qwen/Qwen2.5-1.5B": "8faed761d45a263340a0528343f099c05c9a4323",
    "Qwen/Qwen2.5-1.5B-Instruct": "989aa7980e4cf806f80c7fef2b1adb7bc71aa306",
    "Qwen/Qwen2.5-7B-Instruct": "a09a35458c702b33eeacc393d103063234e8bc28",
}
"""Hub id to the commit that is used; nothing else is ever downloaded."""

_EXPORTED_STEP: Final = Job.result["train"]["exported_step"].as_integer()


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """A model as lists show it."""

    id: str
    created_at: float
    source: Source
    root: str
    parent: str | None = None
    objective: str | None = None
    job_id: str | None = None
    step: int | None = None
    sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class ResolvedModel:
    """What a job's configuration needs to know of a model."""

    name: str
    """Public name, aliases resolved."""
    source: str
    """Absolute directory, or a hub id."""
    revision: str | None
    """Commit of a hub model."""
    root: str
    """Name of the base model at the root of the chain; slash-free."""
    is_vision: bool
    tokenizer_sha256: str | None
    """None for hub models: they are not here before their first use."""


def alias(hub_id: str) -> str:
    """Qwen/Qwen2.5-VL-3B-Instruct -> qwen2.5-vl-3b-instruct."""
    return hub_id.rpartition("/")[2].lower()


class ModelRegistry:
    """The models that these settings offer."""

    def __init__(self, settings: Settings) -> None:
        self._directory = settings.resolved_models_dir
        self._hub = {alias(hub_id): hub_id for hub_id in HUB_MODELS} if settings.hub_models else {}

    def list(self, s: Session, project: str) -> list[ModelEntry]:
        """Every model that the project may use; checkpoints are listed with their jobs instead."""
        tuned = (
            select(Model, _EXPORTED_STEP)
            .join(Job, Job.id == Model.job_id)
            .where(Model.project == project, Model.deleted_at.is_(None))
        )
        rows = s.execute(tuned.order_by(Model.created_at.desc(), Model.id.desc())).all()
        return [*self._bases(), *(_tuned_entry(model, step) for model, step in rows)]

    def get(self, s: Session, project: str, name: str) -> ModelEntry:
        """A model by its name, alias or hub id. Raises NotFoundError."""
        base = self._hub.get(name, name)
        for entry in self._bases():
            if name == entry.id or (entry.source == "hub" and base == self._hub[entry.id]):
                return entry
        if (model := _tuned(s, project, name)) is not None:
            return _tuned_entry(model, s.scalar(select(_EXPORTED_STEP).where(Job.id == model.job_id)))
        if (found := _checkpoint(s, project, name)) is not None:
            checkpoint, job = found
            return ModelEntry(
                id=name,
                created_at=checkpoint.created_at,
                source="checkpoint",
                root=job.root or "",
                parent=job.model,
                objective=job.config["train"]["objective"]["name"],
                job_id=job.id,
                step=checkpoint.step,
            )
        raise NotFoundError(f"there is no model {name!r}", param="model", code="model_not_found")

    def resolve(self, s: Session, project: str, name: str, *, param: str = "model") -> ResolvedModel:
        """Where a model is. Raises InvalidRequestError naming ``param`` and the base models there are."""
        try:
            entry = self.get(s, project, name)
        except NotFoundError:
            known = ", ".join(base.id for base in self._bases()) or f"none: put one into {self._directory}"
            message = f"{param}: there is no model {name!r} in this project; base models: {known}"
            raise InvalidRequestError(message, param=param, code="model_not_found") from None
        if entry.source == "hub":
            hub_id = self._hub[entry.id]
            return ResolvedModel(
                name=entry.id,
                source=hub_id,
                revision=HUB_MODELS[hub_id],
                root=entry.root,
                is_vision="-vl-" in entry.id,
                tokenizer_sha256=None,
            )
        directory = self._directory_of(s, project, entry)
        storage.look(directory)
        if _config_path(directory) is None:
            message = f"{param}: the files of {name!r} are gone from {directory}: choose another model"
            raise InvalidRequestError(message, param=param, code="model_not_found")
        return ResolvedModel(
            name=entry.id,
            source=str(directory),
            revision=None,
            root=entry.root,
            is_vision=_is_vision(directory),
            tokenizer_sha256=tokenizer_sha256(directory),
        )

    def delete(self, s: Session, project: str, name: str) -> Path:
        """Withdraw a fine-tuned model; returns its directory, whose removal is the caller's.

        Raises NotFoundError, and InvalidStateError for models that no job of the project made.
        """
        model = _tuned(s, project, name)
        if model is None:
            entry = self.get(s, project, name)
            raise InvalidStateError(f"{name!r} is a {entry.source} model: only fine-tuned models can be deleted")
        model.deleted_at = now(s)
        s.flush()
        return Path(model.path)

    def _bases(self) -> Iterator[ModelEntry]:
        if self._directory.is_dir():
            for config in sorted(self._directory.glob("*/config.json")):
                name = config.parent.name
                yield ModelEntry(id=name, created_at=config.stat().st_mtime, source="base", root=name)
        for name in self._hub:
            # A local directory of the same name is what its owner wants to be used.
            if not (self._directory / name / "config.json").is_file():
                yield ModelEntry(id=name, created_at=0.0, source="hub", root=name)

    def _directory_of(self, s: Session, project: str, entry: ModelEntry) -> Path:
        if entry.source == "base":
            return self._directory / entry.id
        if (model := _tuned(s, project, entry.id)) is not None:
            return Path(model.path)
        found = _checkpoint(s, project, entry.id)
        assert found is not None, f"{entry.id} was there a moment ago in this transaction"
        return Path(found[0].path)


def _tuned(s: Session, project: str, name: str) -> Model | None:
    statement = select(Model).where(Model.id == name, Model.project == project, Model.deleted_at.is_(None))
    return s.scalars(statement).one_or_none()


def _checkpoint(s: Session, project: str, name: str) -> tuple[Checkpoint, Job] | None:
    statement = select(Checkpoint, Job).join(Job, Job.id == Checkpoint.job_id)
    row = s.execute(statement.where(Checkpoint.name == name, Job.project == project)).one_or_none()
    return None if row is None else (row[0], row[1])


def _tuned_entry(model: Model, step: int | None) -> ModelEntry:
    return ModelEntry(
        id=model.id,
        created_at=model.created_at,
        source="tuned",
        root=model.root,
        parent=model.parent,
        objective=model.objective,
        job_id=model.job_id,
        step=step,
        sha256=model.sha256,
    )


def _config_path(directory: Path) -> Path | None:
    """A whole model's config.json, or that of an adapter, such as a LoRA checkpoint."""
    return next((path for name in CONFIG_NAMES if (path := directory / name).is_file()), None)


def _is_vision(directory: Path) -> bool:
    """By the configuration's model_type; an adapter is what its base is. Raises InvalidRequestError."""
    path = _config_path(directory)
    if path is None:
        return False
    try:
        config = json.loads(path.read_bytes())
        if path.name == "config.json":
            return config["model_type"] in VISION_MODEL_TYPES
        base = config["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        message = f"{path} cannot be used ({type(error).__name__}: {error}): replace the model's files"
        raise InvalidRequestError(message, param="model", code="unsupported_model") from None
    return "-vl-" in alias(base) if base in HUB_MODELS else _is_vision(Path(base))
