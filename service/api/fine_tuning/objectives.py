"""GET /v1/fine_tuning/objectives: which objectives there are, and what may be said of each. Knows no job."""

from __future__ import annotations

from typing import Any, Literal, get_args

from fastapi import APIRouter

from service.api.fine_tuning.objective_options import SUMMARIES
from service.api.fine_tuning.requests import SupervisedMethod
from service.api.schemas import ResponseModel
from vlm_dft.objective_config import Objective

router = APIRouter(prefix="/v1/fine_tuning/objectives", tags=["fine-tuning"])


class ObjectiveObject(ResponseModel):
    """One objective, as method.supervised.objective names it."""

    id: Objective
    object: Literal["fine_tuning.objective"] = "fine_tuning.objective"
    description: str
    """What sets it apart, in a few words."""
    options: dict[str, dict[str, Any]]
    """What method.supervised.<id> may hold: name -> JSON Schema with its default; empty: nothing."""


class ObjectiveList(ResponseModel):
    """All of them."""

    object: Literal["list"] = "list"
    data: list[ObjectiveObject]


@router.get("")
def list_objectives() -> ObjectiveList:
    """Every objective with its options, their limits and their defaults."""
    return ObjectiveList(
        data=[ObjectiveObject(id=name, description=words, options=_options(name)) for name, words in SUMMARIES.items()]
    )


def _options(name: str) -> dict[str, dict[str, Any]]:
    """Read from what requests are checked with, without null: null means not given."""
    field = SupervisedMethod.model_fields.get(name)
    if field is None:
        return {}
    (options, _) = get_args(field.annotation)
    found = {}
    for option, schema in options.model_json_schema()["properties"].items():
        (given, *_) = (branch for branch in schema.get("anyOf", [schema]) if branch.get("type") != "null")
        found[option] = {**given, "default": schema["default"], "description": schema["description"]}
        found[option].pop("title", None)
    return found
