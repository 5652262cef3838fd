"""What a client may ask of an evaluation, alone or after a training. Knows nothing about files or the database."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from service.api.schemas import Metadata, Name, RequestModel, Text
from vlm_dft.config import GenerationSettings, PixelConfig


class BenchmarkChoice(RequestModel):
    """One benchmark to score."""

    name: Name
    """As GET /v1/benchmarks lists it."""
    limit: int | None = Field(default=None, ge=1, le=10_000_000)
    """Only the first items; the score is then marked as a subset."""


def _name_alone(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


BenchmarkName = Annotated[BenchmarkChoice, BeforeValidator(_name_alone, json_schema_input_type=str | BenchmarkChoice)]


class EvaluationSettings(RequestModel, GenerationSettings):
    """Which benchmarks, and how answers are generated."""

    benchmarks: list[BenchmarkName] = Field(min_length=1, max_length=100)
    """Names, or objects with name and limit."""
    limit: int | None = Field(default=None, ge=1, le=10_000_000)
    """Only the first items of every benchmark that has no limit of its own."""
    system_prompt: Text | None = None
    pixels: PixelConfig | None = None
    """Not given: the pixel limits that the model was trained with."""
    judge: bool = False
    """Let the server's judge decide what rules cannot; scores with and without a judge are not comparable."""

    @field_validator("benchmarks")
    @classmethod
    def _each_once(cls, value: list[BenchmarkChoice]) -> list[BenchmarkChoice]:
        names = [choice.name for choice in value]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{name!r} was given twice")
        return value


class ProbePlan(RequestModel):
    """A few fixed items of a benchmark, answered during the training and graded by rules."""

    benchmark: Name
    """As GET /v1/benchmarks lists it."""
    limit: int = Field(default=64, ge=1, le=100_000)
    every_steps: int = Field(default=100, ge=1)
    patience: int | None = Field(default=None, ge=1)
    """End the training when that many measurements in a row bring no new best accuracy; not given: measure only."""
    prompt: Literal["direct", "cot"] = "direct"
    max_new_tokens: int = Field(default=512, ge=1, le=65536)


class EvaluationPlan(EvaluationSettings):
    """``evaluation`` of a fine-tuning job."""

    include_base: bool = False
    """Score the model before the training as well, on the same items with the same settings."""
    probe: ProbePlan | None = None
    """Measure accuracy during the training as well, and end it when it no longer grows."""


class CreateEvaluation(EvaluationSettings):
    """Body of POST /v1/evaluations."""

    model: Name
    """A base model, a fine-tuned model (ft:...) or a checkpoint."""
    metadata: Metadata | None = None
