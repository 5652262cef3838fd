"""What a client may ask of a comparison: one job, and what each arm does otherwise. Knows no file or database."""

from __future__ import annotations

from itertools import product
from math import prod
from typing import Annotated, Any, Final, Self

from pydantic import Field, field_validator, model_validator

from service.api.errors import validated
from service.api.fine_tuning.objective_options import ObjectiveName
from service.api.fine_tuning.requests import CreateFineTuningJob
from service.api.schemas import Metadata, Name, RequestModel
from service.errors import InvalidRequestError

MAX_ARMS: Final = 64
BASE: Final = "base"
"""How results name the model before; no arm may be called so."""

ARM_KEY: Final = "arm"
"""In the metadata of each arm's job: the arm's name."""

ArmName = Annotated[str, Field(min_length=1, max_length=40, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
LearningRate = Annotated[float, Field(gt=0, le=1)]
BatchSize = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]


class ComparisonArm(RequestModel):
    """One arm; what it does not name, it does as ``job`` says."""

    name: ArmName
    """Becomes the end of its model's suffix."""
    objective: ObjectiveName | None = None
    """As in method.supervised."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Of the objective, as in method.supervised.<objective>."""
    learning_rate: LearningRate | None = None
    """Peak, in the place of the job's learning_rate or learning_rate_multiplier."""
    batch_size: BatchSize | None = None
    """Samples per optimizer step."""
    seed: Seed | None = None
    """Of the order of samples, and of adapters."""

    @model_validator(mode="after")
    def _options_of_an_objective(self) -> Self:
        if self.options and self.objective is None:
            raise ValueError("options belong to an objective: name it too")
        return self


class ComparisonGrid(RequestModel):
    """Arms for every combination, in this order."""

    objective: list[ObjectiveName] = Field(default_factory=list, max_length=MAX_ARMS)
    """Each with the options that the job gives it."""
    learning_rate: list[LearningRate] = Field(default_factory=list, max_length=MAX_ARMS)
    """Peaks."""
    batch_size: list[BatchSize] = Field(default_factory=list, max_length=MAX_ARMS)
    """Samples per optimizer step: more of them, fewer steps."""
    seed: list[Seed] = Field(default_factory=list, max_length=MAX_ARMS)
    """The sweep shows mean and standard deviation over them."""

    @model_validator(mode="after")
    def _some_combinations(self) -> Self:
        # Counted before any is made: four full axes have millions.
        count = prod(len(values) for values in self._axes().values())
        if not self._axes() or count > MAX_ARMS:
            raise ValueError(f"there are {count if self._axes() else 0} combinations; a grid makes 1 to {MAX_ARMS}")
        return self

    def _axes(self) -> dict[str, list[Any]]:
        return {name: values for name, values in self if values}

    def arms(self) -> list[ComparisonArm]:
        """Named after what they set, such as dft-lr5e-05-seed1."""
        axes = self._axes()
        found = []
        for values in product(*axes.values()):
            chosen = dict(zip(axes, values, strict=True))
            found.append(ComparisonArm(name="-".join(_part(name, value) for name, value in chosen.items()), **chosen))
        return found


def _part(axis: str, value: Any) -> str:
    if axis == "learning_rate":
        return f"lr{value:g}"
    return {"batch_size": f"batch{value}", "seed": f"seed{value}"}.get(axis, str(value))


class CreateComparison(RequestModel):
    """Body of POST /v1/fine_tuning/comparisons."""

    job: CreateFineTuningJob
    """What all arms have in common; method, if given, in its supervised form."""
    arms: list[ComparisonArm] = Field(default_factory=list, max_length=MAX_ARMS)
    """The first is the reference of the others."""
    grid: ComparisonGrid | None = None
    """Instead of arms, or after them."""
    name: Name | None = None
    """For people; not given: the arms' names."""
    metadata: Metadata | None = None
    """Of every arm's job, beside job.metadata and the key arm, which holds the arm's name."""

    @field_validator("job")
    @classmethod
    def _in_the_supervised_form(cls, job: CreateFineTuningJob) -> CreateFineTuningJob:
        if job.method is not None and job.method.type != "supervised":
            raise ValueError('method.type must be "supervised" here: each arm names its objective')
        return job

    @model_validator(mode="after")
    def _several_arms_of_different_names(self) -> Self:
        names = [arm.name for arm in self.all_arms()]
        if not 2 <= len(names) <= MAX_ARMS:
            raise ValueError(f"arms: {len(names)} given; a comparison needs 2 to {MAX_ARMS}, from arms and grid")
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"arms: {name!r} was given twice")
        if BASE in names:
            raise ValueError(f"arms: {BASE!r} is the model before in every result: give the arm another name")
        return self

    @model_validator(mode="after")
    def _no_metadata_of_two_meanings(self) -> Self:
        of_job, of_all = self.job.metadata or {}, self.metadata or {}
        for place, given in (("job.metadata", of_job), ("metadata", of_all)):
            if ARM_KEY in given:
                raise ValueError(f"{place}.{ARM_KEY}: each job's holds its arm's name: call yours otherwise")
        for key in sorted(of_job.keys() & of_all.keys()):
            raise ValueError(f"metadata.{key}: job.metadata has it too: give it once")
        return self

    def all_arms(self) -> list[ComparisonArm]:
        return [*self.arms, *(self.grid.arms() if self.grid else [])]

    def names_of_arms(self) -> str:
        """What a comparison without a name is called."""
        names = [arm.name for arm in self.all_arms()]
        more = [f"{len(names) - 4} more"] if len(names) > 4 else []
        return " or ".join(names[:4] + more)

    def job_of(self, arm: ComparisonArm) -> CreateFineTuningJob:
        """The request that the arm's job would have been alone. Raises InvalidRequestError naming the arm."""
        body = self.job.model_dump(mode="json", exclude_unset=True)
        supervised = body.setdefault("method", {"type": "supervised"}).setdefault("supervised", {})
        if arm.objective is not None:
            _choose_objective(supervised, arm)
        numbers = {name: getattr(arm, name) for name in ("learning_rate", "batch_size")}
        supervised.setdefault("hyperparameters", {}).update({k: v for k, v in numbers.items() if v is not None})
        if arm.learning_rate is not None:
            supervised["hyperparameters"].pop("learning_rate_multiplier", None)
        if arm.seed is not None:
            body["seed"] = arm.seed
        body["suffix"] = "-".join(filter(None, (body.get("suffix"), arm.name)))
        body["metadata"] = {**(body.get("metadata") or {}), **(self.metadata or {}), ARM_KEY: arm.name}
        try:
            return validated(CreateFineTuningJob, body)
        except InvalidRequestError as error:
            raise InvalidRequestError(f"arm {arm.name}: {error.message}", param="arms") from None


def _choose_objective(supervised: dict[str, Any], arm: ComparisonArm) -> None:
    """The arm's objective, without the options of the one that it replaces."""
    old = supervised.get("objective", "nll")
    if old != arm.objective or arm.options:
        supervised.pop(old, None)
    supervised["objective"] = arm.objective
    if arm.options:
        assert arm.objective is not None, "checked with the request"
        supervised[arm.objective] = arm.options
