"""What the requests and answers of all resources share. Knows no resource."""

from __future__ import annotations

from typing import Annotated, Any, Generic, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from vlm_dft.config import Frozen

Item = TypeVar("Item")


def _no_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("the character U+0000 cannot be stored")
    return text


Text = Annotated[str, AfterValidator(_no_nul)]
Name = Annotated[str, Field(min_length=1, max_length=255), AfterValidator(_no_nul)]
MetadataKey = Annotated[str, Field(min_length=1, max_length=64), AfterValidator(_no_nul)]
MetadataValue = Annotated[str, Field(max_length=512), AfterValidator(_no_nul)]
Metadata = Annotated[
    dict[MetadataKey, MetadataValue],
    Field(max_length=16, description="Up to 16 texts of up to 512 characters, by keys of up to 64."),
]


class RequestModel(Frozen):
    """Base of what clients send: an unknown key is an error that lists the known ones, null means not given."""

    @model_validator(mode="before")
    @classmethod
    def _known_keys_without_nulls(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for key in values:
            if key not in cls.model_fields:
                context = {"key": str(key), "known": ", ".join(cls.model_fields)}
                raise PydanticCustomError("unknown_key", "this key is not known here; known are: {known}", context)
        return {key: value for key, value in values.items() if value is not None}


class ResponseModel(BaseModel):
    """Base of what we answer; the docstring under each field is its documentation in the OpenAPI."""

    model_config = ConfigDict(use_attribute_docstrings=True, extra="forbid")


class ListPage(ResponseModel, Generic[Item]):
    """A page of a list; ask for the next one with after=<last_id> while has_more is true."""

    object: Literal["list"] = "list"
    data: list[Item]
    has_more: bool
    first_id: str | None
    last_id: str | None

    @classmethod
    def of(cls, items: list[Item], has_more: bool) -> Self:
        """Of items that have an id."""
        ids = [getattr(item, "id", None) for item in (items[0], items[-1])] if items else [None, None]
        return cls(data=items, has_more=has_more, first_id=ids[0], last_id=ids[1])


class Deleted(ResponseModel):
    """An object that is gone."""

    id: str
    object: str
    deleted: bool = True


def form_fields(model: type[BaseModel]) -> dict[str, Any]:
    """The OpenAPI of a flat model's fields as parts of a form: a form has no null, a field is left out instead."""
    fields = {}
    for name, schema in model.model_json_schema()["properties"].items():
        given = [branch for branch in schema.get("anyOf", [schema]) if branch.get("type") != "null"]
        fields[name] = {"description": schema["description"]} if "description" in schema else {}
        fields[name] |= given[0] if len(given) == 1 else {"anyOf": given}
        fields[name].pop("default", None)
    return fields
