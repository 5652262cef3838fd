"""What a client may ask of a fine-tuning job: OpenAI's request with our keys inside ``method``.

Scalars have the trainer's own names, limits and defaults (``vlm_dft.config``); "auto" and null mean the default.
Knows nothing about files, models or the database.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from service.api.evaluations.requests import EvaluationPlan
from service.api.fine_tuning.objective_options import (
    AsftOptions,
    DftNllOptions,
    DftOptions,
    EaftOptions,
    IwSftOptions,
    ObjectiveName,
    PowerOptions,
    PsftOptions,
    ThresholdOptions,
    objective_config,
)
from service.api.schemas import Metadata, Name, RequestModel
from vlm_dft.config import FreezeConfig, FullConfig, Hyperparameters, LoraConfig, PixelConfig
from vlm_dft.objective_config import OBJECTIVE_OPTIONS, ObjectiveConfig

BASE_LEARNING_RATE = Hyperparameters.model_fields["learning_rate"].default
"""What learning_rate_multiplier multiplies."""
PRIORITIES = {"low": -10, "normal": 0, "high": 10}
Priority = Literal["low", "normal", "high"] | Annotated[int, Field(strict=True, ge=-100, le=100)]
"""Higher goes first; a number where three words are too few."""


class RequestedHyperparameters(RequestModel, Hyperparameters):
    """Every number of a training; each may be "auto"."""

    model_config = ConfigDict(strict=True)

    learning_rate_multiplier: float = Field(default=1.0, gt=0.0, le=1 / BASE_LEARNING_RATE)
    """OpenAI's way to say the learning rate: times 5e-5."""
    sample_rows: int = Field(default=4, ge=0, le=64)
    """Held-out rows, or training rows without a held-out file, that the model answers before the first step, at each
    probe_every_steps and at the end; 0: none, which is the default with fsdp, where no process has the whole model."""

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


class TrainingOptions(RequestModel):
    """How the trainer does its work: each changes speed and memory, none what is trained."""

    patch_cache: bool = False
    """Decode and resize images once for all epochs and jobs, in the service's cache directory."""
    vision_cache: bool = False
    """The same for a frozen vision tower's features: neither images nor tower are needed after the first pass."""
    compile: bool = False
    """torch.compile the language model's layers: a minute or more at the start, faster steps on a GPU."""
    fsdp: bool = False
    """Cut the language model over all GPUs of a worker, where one cannot hold it with its optimizer."""


class OpenAIHyperparameters(RequestedHyperparameters):
    """OpenAI's deprecated top-level hyperparameters: n_epochs, batch_size and learning_rate_multiplier."""

    @model_validator(mode="after")
    def _the_three(self) -> Self:
        for name in self.model_fields_set - {"n_epochs", "batch_size", "learning_rate_multiplier"}:
            raise ValueError(f"{name} belongs into method.supervised.hyperparameters")
        return self


class _Training(RequestModel):
    """What both spellings of the method share."""

    hyperparameters: RequestedHyperparameters = RequestedHyperparameters()
    adapter: Annotated[FullConfig | LoraConfig, Field(discriminator="type")] = FullConfig()
    freeze: FreezeConfig = FreezeConfig()
    pixels: PixelConfig = PixelConfig()
    training: TrainingOptions = TrainingOptions()


class SupervisedMethod(_Training):
    """method.supervised"""

    objective: ObjectiveName = "nll"
    """nll, or its alias sft: plain supervised fine-tuning. dft: each token's loss is weighted by its probability. The
    options of an objective are in the sub-object of its name."""
    dft: DftOptions | None = None
    dft_nll: DftNllOptions | None = None
    power: PowerOptions | None = None
    threshold: ThresholdOptions | None = None
    eaft: EaftOptions | None = None
    asft: AsftOptions | None = None
    iw_sft: IwSftOptions | None = None
    psft: PsftOptions | None = None

    @model_validator(mode="after")
    def _options_belong_to_the_objective(self) -> Self:
        for name, options in OBJECTIVE_OPTIONS.items():
            if options and name != self.objective and getattr(self, name) is not None:
                raise ValueError(f'{name}: options of the objective {name}, but objective is "{self.objective}"')
        self.resolved_objective()
        return self

    def resolved_objective(self) -> ObjectiveConfig:
        """Raises ValueError for options that contradict each other."""
        return objective_config(self.objective, getattr(self, self.objective, None))


class DftMethod(_Training, DftOptions):
    """method.dft, with {"type": "dft"}: the short spelling of method.supervised with objective dft."""

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        self.resolved_objective()
        return self

    def resolved_objective(self) -> ObjectiveConfig:
        """As SupervisedMethod's."""
        return objective_config("dft", DftOptions(weight_floor=self.weight_floor, weight_cap=self.weight_cap))


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
    """Order of the samples, dropout and adapter initialisation; not given: 42."""
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
    """Higher goes first: low is -10, normal 0, high 10."""
    auto_start: bool = True
    """False: the job waits for POST .../start."""
    deadline_seconds: float | None = Field(default=None, gt=0, le=366 * 86400)
    """The job fails with code timeout, its checkpoints kept, when it has not ended so long after it was queued."""

    @field_validator("integrations")
    @classmethod
    def _no_integrations(cls, value: list[Any] | None) -> list[Any] | None:
        if value:
            raise ValueError("no integration is available on this server: leave it out; /metrics has every number")
        return value


class CloneFineTuningJob(CreateFineTuningJob):
    """The request of a clone: the original's, changed by what the body names."""

    cloned_from: Name
    """The original."""


class UpdateFineTuningJob(RequestModel):
    """Body of PATCH /v1/fine_tuning/jobs/{id}."""

    priority: Priority
    """As in CreateFineTuningJob."""


def ranked(priority: Priority) -> int:
    """The number of a priority."""
    return PRIORITIES[priority] if isinstance(priority, str) else priority
