"""What no training can do, found before it is queued: settings that contradict the model or each other.

The trainer finds the same, after it has waited for a GPU and loaded the model. Knows nothing about files.
"""

from __future__ import annotations

from service.errors import InvalidRequestError
from service.jobs.models import ResolvedModel
from vlm_dft.config import FreezeConfig, FullConfig, TrainConfig


def check_training(train: TrainConfig, model: ResolvedModel, method: str) -> None:
    """method: its place in the request, for messages. Raises InvalidRequestError."""
    if not isinstance(train.adapter, FullConfig) and train.freeze != FreezeConfig():
        message = f"{method}.freeze: applies to full fine-tuning; with lora only the adapters are trained: choose "
        raise InvalidRequestError(message + "adapter.targets", param=f"{method}.freeze")
    trained = trained_parts(train, model)
    if not trained:
        message = f"{method}.freeze: every part of the model is frozen, nothing is left to train: unfreeze one"
        raise InvalidRequestError(message, param=f"{method}.freeze")
    for part in ("vision", "merger"):
        name = f"{part}_learning_rate"
        if getattr(train, name) is not None and part not in trained:
            message = f"{method}.hyperparameters.{name}: this training leaves the {part} part as it is: leave it out"
            raise InvalidRequestError(message, param=f"{method}.hyperparameters.{name}")
    if (reason := _head_backend_cannot(train)) is not None:
        place = f"{method}.hyperparameters.head_backend"
        raise InvalidRequestError(f"{place}: {train.head_backend} {reason}: leave it out", param=place)
    if train.vision_cache is not None and not model.is_vision:
        message = f"{method}.training.vision_cache: {model.name} is a text model, without a vision tower: leave it out"
        raise InvalidRequestError(message, param=f"{method}.training.vision_cache", code="model_without_vision")


def _head_backend_cannot(train: TrainConfig) -> str | None:
    """Why it cannot serve, as far as settings tell; the trainer knows device and types."""
    if train.head_backend in ("auto", "torch"):
        return None
    if train.objective.name == "asft" and train.objective.kl_weight > 0:
        return "has not the base model's distribution, which asft needs"
    if train.head_backend == "linear_cross_entropy" and train.precision == "bf16":
        return "rounds in bf16: it needs precision fp32"
    return None


def trained_parts(train: TrainConfig, model: ResolvedModel) -> set[str]:
    """language, vision, merger: those whose weights change."""
    if isinstance(train.adapter, FullConfig):
        freeze = train.freeze
        frozen = {"language": freeze.language_model, "vision": freeze.vision_tower, "merger": freeze.merger}
    else:
        frozen = {"language": False} | dict.fromkeys(("vision", "merger"), train.adapter.targets == "language")
    parts = frozen if model.is_vision else {"language": frozen["language"]}
    return {part for part, is_frozen in parts.items() if not is_frozen}
