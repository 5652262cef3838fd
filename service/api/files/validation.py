"""From a client's options to the ValidationConfig of a file's validation job."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy.orm import Session

from service.api.files.schemas import ValidationOptions
from service.jobs.models import ModelRegistry, ResolvedModel
from service.settings import Settings
from vlm_dft.config import PixelConfig, ValidationConfig

_OPTION_NAMES = tuple(ValidationOptions.model_fields)


def validation_config(
    s: Session,
    project: str,
    options: ValidationOptions,
    *,
    source: Path,
    filename: str,
    settings: Settings,
    registry: ModelRegistry,
) -> ValidationConfig:
    """Raises InvalidRequestError for an unknown model."""
    model = counting_model(s, project, registry, options.model)
    return ValidationConfig(
        source=source,
        filename=filename,
        data_file=options.data_file,
        format=options.dataset_format,
        tokenizer=model.source if model else None,
        max_length_tokens=options.max_length_tokens or settings.default_max_length_tokens,
        pixels=PixelConfig(min_pixels=options.min_pixels, max_pixels=options.max_pixels),
        system_prompt=options.system_prompt,
        max_invalid_fraction=options.max_invalid_fraction,
        allow_image_urls=settings.allow_image_urls,
        image_url_domains=settings.image_url_domains,
    )


def counting_model(s: Session, project: str, registry: ModelRegistry, name: str | None) -> ResolvedModel | None:
    """The model whose tokenizer counts: the named one, else the first vision model here, else the first model here.

    None when its tokenizer is not on this machine (a hub model): then rows are counted when a job trains on them.
    """
    if name is not None:
        named = registry.resolve(s, project, name)
        return None if named.tokenizer_sha256 is None else named
    bases = [entry for entry in registry.list(s, project) if entry.source == "base"]
    models = [registry.resolve(s, project, entry.id) for entry in bases]
    return next((model for model in models if model.is_vision), models[0] if models else None)


def given_options(options: ValidationOptions) -> dict[str, object]:
    """The options as the client gave them, for the file's record."""
    return options.model_dump(mode="json", include=set(_OPTION_NAMES) & options.model_fields_set)
