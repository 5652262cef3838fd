"""A row as its format tells it, before pictures are opened: the common form of all formats, and its rules. Torch-free.

Every format module turns one JSON object into a ``Draft`` or raises RowError; what all rows must fulfil is checked
here, once. Each turn and picture keeps the field it came from, so that messages name what the user wrote.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from vlm_dft.config import ValidationLimits
from vlm_dft.data.problems import RowError, kind, shown

PLACEHOLDER = "<image>"

# What Qwen's and Llama's tokenizers read as structure; a job's own tokenizer is asked again when it is known.
_QWEN = (
    "im_start im_end endoftext object_ref_start object_ref_end box_start box_end quad_start quad_end "
    "vision_start vision_end vision_pad image_pad video_pad"
)
_LLAMA = "begin_of_text end_of_text start_header_id end_header_id eot_id eom_id python_tag finetune_right_pad_id image"
CONTROL_TOKENS = tuple(f"<|{name}|>" for name in f"{_QWEN} {_LLAMA}".split())


@dataclass(frozen=True)
class Picture:
    """A picture by reference: a path, a data: URI or an https URL."""

    reference: str
    field: str


@dataclass(frozen=True)
class Turn:
    """One message."""

    role: Literal["system", "user", "assistant"]
    content: tuple[str | Picture, ...]
    field: str
    """Dotted path of its text in the user's row."""
    train: bool = True

    @property
    def text(self) -> str:
        return "".join(part for part in self.content if isinstance(part, str))

    @property
    def pictures(self) -> list[Picture]:
        return [part for part in self.content if isinstance(part, Picture)]


@dataclass(frozen=True)
class Draft:
    """One row."""

    turns: tuple[Turn, ...]
    answer: str | None = None
    category: str | None = None
    default_system: str | None = field(default=None)
    """System prompt of the format, for rows and requests that bring none."""

    @property
    def pictures(self) -> Iterator[Picture]:
        return (picture for turn in self.turns for picture in turn.pictures)

    def with_system(self, requested: str | None) -> Draft:
        """The row with a system turn: its own, else the requested one, else the format's, else none."""
        prompt = requested if requested is not None else self.default_system
        if not prompt or (self.turns and self.turns[0].role == "system"):
            return self
        return replace(self, turns=(Turn("system", (prompt,), "system_prompt"), *self.turns))


def check(draft: Draft, limits: ValidationLimits) -> None:
    """What every row must fulfil, whatever its format. Raises RowError."""
    turns = draft.turns
    for turn in turns:
        _check_turn(turn)
    for turn in turns[1:]:
        if turn.role == "system":
            raise RowError(turn.field, "system_not_first", "a system turn must be the first turn of the row")
    spoken = [turn for turn in turns if turn.role != "system"]
    if not spoken or spoken[0].role != "user":
        raise RowError(
            _field(turns), "first_turn_not_user", "the first turn after the system prompt must be the user's"
        )
    if spoken[-1].role != "assistant":
        reason = "the last turn must be the assistant's: nothing after it would be learned"
        raise RowError(spoken[-1].field, "last_turn_not_assistant", reason)
    if not any(turn.train for turn in spoken if turn.role == "assistant"):
        raise RowError(_field(turns), "all_masked", "every assistant turn has weight 0: the row would teach nothing")
    pictures = sum(len(turn.pictures) for turn in turns)
    if pictures > limits.max_images_per_row:
        reason = f"{pictures} pictures in one row; at most {limits.max_images_per_row} are allowed"
        raise RowError(_field(turns), "too_many_images", reason)


def _check_turn(turn: Turn) -> None:
    if not turn.text.strip() and not turn.pictures:
        raise RowError(turn.field, "empty_turn", f"the {turn.role} turn is empty")
    if turn.pictures and turn.role != "user":
        raise RowError(
            turn.pictures[0].field, "image_outside_user", f"a picture in a {turn.role} turn: move it to the user's"
        )
    check_text(turn.text, turn.field)
    if "<|" in turn.text:
        for token in CONTROL_TOKENS:
            if token in turn.text:
                reason = f"the text holds {token!r}, which models read as structure: reword it"
                raise RowError(turn.field, "special_token_in_text", reason)


def _field(turns: tuple[Turn, ...]) -> str:
    """The common beginning of the turns' fields, such as messages."""
    return turns[-1].field.split(".")[0] if turns else ""


def check_text(text: str, field: str) -> None:
    """Refuse half a surrogate pair: it is no text, and no file can hold it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        reason = (
            f"character {error.start} is half of a surrogate pair ({shown(text[error.start])}): it is no valid text"
        )
        raise RowError(field, "invalid_unicode", reason) from None


def required(record: dict[str, Any], name: str, expected: type, prefix: str = "") -> Any:
    """record[name], of the expected JSON type. Raises RowError."""
    path = f"{prefix}{name}"
    if name not in record:
        raise RowError(path, "missing_field", f"the field is missing; present are {shown(sorted(record), 120)}")
    value = record[name]
    if not isinstance(value, expected):
        wanted = {str: "a string", list: "an array", dict: "an object"}[expected]
        raise RowError(path, "wrong_type", f"{wanted} is expected, not {kind(value)} ({shown(value)})")
    return value
