"""What a client may ask of an evaluation, alone or after a training. Knows nothing about files or the database."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

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
    """Before each item; not given: the chat template's own."""
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
    """The first items."""
    every_steps: int = Field(default=100, ge=1)
    """Steps between two measurements, beside before the first step and after the last one."""
    patience: int | None = Field(default=None, ge=1)
    """End the training when that many measurements in a row bring no new best accuracy, and make the model of the best
    measurement's weights; not given: measure only, and the last weights are the model."""
    prompt: Literal["direct", "cot"] = "direct"
    """Which of the benchmark's published prompts is used."""
    max_new_tokens: int = Field(default=512, ge=1, le=65536)
    """Where an answer is cut."""


class GateRule(RequestModel):
    """Thresholds of one benchmark that a model must keep to pass; in the score's own units, 0..1."""

    benchmark: Name
    """One of the plan's."""
    min_value: float | None = Field(default=None, ge=0, le=1)
    """Smallest score."""
    min_gain: float | None = Field(default=None, ge=-1, le=1)
    """Smallest difference to the base model's score."""
    max_drop: float | None = Field(default=None, ge=0, le=1)
    """Largest loss against the base model, in item accuracy, that the paired 95 % interval may still hold."""

    @model_validator(mode="after")
    def _something(self) -> Self:
        if self.min_value is None and self.min_gain is None and self.max_drop is None:
            raise ValueError("give min_value, min_gain or max_drop")
        return self

    @property
    def compares(self) -> bool:
        """Whether the base model's score is needed."""
        return self.min_gain is not None or self.max_drop is not None


class EvaluationPlan(EvaluationSettings):
    """``evaluation`` of a fine-tuning job."""

    include_base: bool = False
    """Score the model before the training as well, on the same items with the same settings."""
    probe: ProbePlan | None = None
    """Measure accuracy during the training as well, and end it when it no longer grows."""
    regression: list[Name] = Field(default_factory=list, max_length=100)
    """Those of the benchmarks that ask for what the model could do before: the report says what it has lost."""
    gate: list[GateRule] = Field(default_factory=list, max_length=100)
    """Thresholds that the report checks: whether the model may be deployed."""

    @model_validator(mode="after")
    def _of_the_benchmarks(self) -> Self:
        names = [choice.name for choice in self.benchmarks]
        lower = {name.lower() for name in names}
        for place, name in [("regression", name) for name in self.regression] + [
            ("gate", rule.benchmark) for rule in self.gate
        ]:
            if name.lower() not in lower:
                raise ValueError(f"{place}: {name!r} is not among the benchmarks: {', '.join(names)}")
        if not self.include_base and (self.regression or any(rule.compares for rule in self.gate)):
            raise ValueError("include_base must be true: regression, min_gain and max_drop compare with the base model")
        return self


class CreateEvaluation(EvaluationSettings):
    """Body of POST /v1/evaluations."""

    model: Name
    """A base model, a fine-tuned model (ft:...) or a checkpoint."""
    metadata: Metadata | None = None
