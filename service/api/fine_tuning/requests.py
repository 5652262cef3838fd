"""What a client may ask of a fine-tuning job: OpenAI's request with our keys inside ``method``.

Scalars have the trainer's own names, limits and defaults (``vlm_dft.config``); "auto" and null mean the default.
Knows nothing about files, models or the database.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from service.api.evaluations.requests import EvaluationPlan
from service.api.schemas import Metadata, Name, RequestModel
from vlm_dft.config import FreezeConfig, FullConfig, Hyperparameters, LoraConfig, ObjectiveConfig, PixelConfig

BASE_LEARNING_RATE = Hyperparameters.model_fields["learning_rate"].default
"""What learning_rate_multiplier multiplies."""
Priority = Literal["low", "normal", "high"]
PRIORITIES: dict[Priority, int] = {"low": -10, "normal": 0, "high": 10}


class RequestedHyperparameters(RequestModel, Hyperparameters):
    """Every number of a training; each may be "auto"."""

    model_config = ConfigDict(strict=True)

    learning_rate_multiplier: float = Field(default=1.0, gt=0.0, le=1 / BASE_LEARNING_RATE)
    """OpenAI's way to say the learning rate: times 5e-5."""

    @model_validator(mode="before")
    @classmethod
    def _auto_is_the_default(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {key: value for key, value in values.items() if value != "auto" or key not in cls.model_fields}

    @model_validator(mode="after")
    def _one_learning_rate(self) -> Self:
        if {"learning_rate", "learning_rate_multiplier"} <= self.model_fields_set:
            raise ValueError("give learning_rate or learning_rate_multiplier, not both")
        return self

    def resolved(self) -> dict[str, Any]:
        """The trainer's fields."""
        values = self.model_dump(exclude={"learning_rate_multiplier"})
        if "learning_rate_multiplier" in self.model_fields_set:
            values["learning_rate"] = BASE_LEARNING_RATE * self.learning_rate_multiplier
        return values


class OpenAIHyperparameters(RequestedHyperparameters):
    """OpenAI's deprecated top-level hyperparameters: n_epochs, batch_size and learning_rate_multiplier."""

    @model_validator(mode="after")
    def _the_three(self) -> Self:
        for name in self.model_fields_set - {"n_epochs", "batch_size", "learning_rate_multiplier"}:
            raise ValueError(f"{name} belongs into method.supervised.hyperparameters")
        return self


class DftOptions(RequestModel):
    """Options of the objective dft."""

    weight_floor: float = Field(default=0.0, ge=0.0, le=1.0)
    """Smallest weight a token can get; 0 is the paper's objective."""


class _Training(RequestModel):
    """What both spellings of the method share."""

    hyperparameters: RequestedHyperparameters = RequestedHyperparameters()
    adapter: Annotated[FullConfig | LoraConfig, Field(discriminator="type")] = FullConfig()
    freeze: FreezeConfig = FreezeConfig()
    pixels: PixelConfig = PixelConfig()


class SupervisedMethod(_Training):
    """method.supervised"""

    objective: Literal["nll", "sft", "dft"] = "nll"
    """nll, or its alias sft: plain supervised fine-tuning. dft: each token's loss is weighted by its probability."""
    dft: DftOptions | None = None

    @model_validator(mode="after")
    def _options_belong_to_the_objective(self) -> Self:
        if self.dft is not None and self.objective != "dft":
            raise ValueError(f'dft: options of the objective dft, but objective is "{self.objective}"')
        return self

    def resolved_objective(self) -> ObjectiveConfig:
        if self.objective == "dft":
            return ObjectiveConfig(name="dft", weight_floor=self.dft.weight_floor if self.dft else 0.0)
        return ObjectiveConfig(name="nll")


class DftMethod(_Training, DftOptions):
    """method.dft, with {"type": "dft"}: the short spelling of method.supervised with objective dft."""

    def resolved_objective(self) -> ObjectiveConfig:
        return ObjectiveConfig(name="dft", weight_floor=self.weight_floor)


class Method(RequestModel):
    """How to train."""

    type: Literal["supervised", "dft"]
    """dft is an alias: jobs are answered in the supervised form with objective dft, which every typed client parses."""
    supervised: SupervisedMethod | None = None
    dft: DftMethod | None = None

    @model_validator(mode="after")
    def _only_the_named_one(self) -> Self:
        other = "dft" if self.type == "supervised" else "supervised"
        if getattr(self, other) is not None:
            raise ValueError(f'{other} was given, but type is "{self.type}"')
        return self

    @property
    def chosen(self) -> SupervisedMethod | DftMethod:
        if self.type == "dft":
            return self.dft or DftMethod()
        return self.supervised or SupervisedMethod()


class CreateFineTuningJob(RequestModel):
    """Body of POST /v1/fine_tuning/jobs: all of OpenAI's fields, and evaluation and priority. Any other key is refused:
    a setting that is misspelt, or that this server cannot honour, must not be dropped in silence."""

    model: Name
    """A base model, a fine-tuned model (ft:...) or a checkpoint, as GET /v1/models lists them."""
    training_file: Name
    """A processed file with purpose fine-tune."""
    validation_file: Name | None = None
    """A processed held-out file: its NLL is measured before, during and after the training."""
    suffix: str | None = Field(default=None, min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Becomes part of the fine-tuned model's name."""
    seed: int | None = Field(default=None, ge=0, le=2**31 - 1)
    metadata: Metadata | None = None
    integrations: list[Any] | None = None
    """Must be empty: no integration is available on this server."""
    method: Method | None = None
    """Not given: supervised, objective nll, all defaults."""
    hyperparameters: OpenAIHyperparameters | None = Field(default=None, json_schema_extra={"deprecated": True})
    """Use method.supervised.hyperparameters."""
    evaluation: EvaluationPlan | None = None
    """Benchmarks to score after the training."""
    priority: Priority = "normal"

    @field_validator("integrations")
    @classmethod
    def _no_integrations(cls, value: list[Any] | None) -> list[Any] | None:
        if value:
            raise ValueError("no integration is available on this server: leave it out; /metrics has every number")
        return value
