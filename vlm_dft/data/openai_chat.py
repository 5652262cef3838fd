"""OpenAI's chat and vision chat rows: {"messages": [{"role", "content", "weight"}, ...]}. Torch-free.

Content is a string or a list of text and image_url parts. A picture is a data: URI, an https URL where those are
allowed, or, beside what OpenAI takes, a path inside the same archive. ``detail`` has no effect: the job's pixel limits
decide. A literal ``<image>`` in the text is text.
"""

from __future__ import annotations

from typing import Any, Literal

from vlm_dft.data.draft import Draft, Picture, Turn, required
from vlm_dft.data.problems import RowError, kind, shown

_ROLES: dict[str, Literal["system", "user", "assistant"]] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}
_UNSUPPORTED = ("tools", "functions", "tool_calls", "function_call", "tool_call_id", "audio")


def parse(record: dict[str, Any]) -> Draft:
    """One row. Raises RowError."""
    _refuse_unsupported(record, "")
    messages = required(record, "messages", list)
    if not messages:
        raise RowError("messages", "no_messages", "the list of messages is empty")
    return Draft(tuple(_turn(message, f"messages.{index}") for index, message in enumerate(messages)))


def _turn(message: Any, path: str) -> Turn:
    if not isinstance(message, dict):
        raise RowError(path, "wrong_type", f"an object is expected, not {kind(message)} ({shown(message)})")
    _refuse_unsupported(message, f"{path}.")
    name = required(message, "role", str, f"{path}.")
    if name not in _ROLES:
        reason = f"{shown(name)} is no role of a training row; allowed are {', '.join(_ROLES)}"
        raise RowError(f"{path}.role", "unknown_role", reason)
    content = _content(message.get("content"), f"{path}.content")
    return Turn(_ROLES[name], content, f"{path}.content", _weight(message, name, path))


def _refuse_unsupported(record: dict[str, Any], prefix: str) -> None:
    for name in _UNSUPPORTED:
        if record.get(name):
            reason = f"{name} cannot be trained on here: remove it, or write the call as text"
            raise RowError(f"{prefix}{name}", "unsupported_field", reason)


def _weight(message: dict[str, Any], role: str, path: str) -> bool:
    weight = message.get("weight")
    if weight is None:
        return True
    if role != "assistant":
        raise RowError(
            f"{path}.weight", "weight_outside_assistant", f"a weight on a {role} message: only assistants have one"
        )
    if isinstance(weight, bool) or weight not in (0, 1):
        raise RowError(f"{path}.weight", "invalid_weight", f"0 or 1 is expected, not {shown(weight)}")
    return bool(weight)


def _content(content: Any, path: str) -> tuple[str | Picture, ...]:
    if isinstance(content, str):
        return (content,)
    if not isinstance(content, list):
        reason = f"a string or a list of parts is expected, not {kind(content)} ({shown(content)})"
        raise RowError(path, "wrong_type", reason)
    return tuple(_part(part, f"{path}.{index}") for index, part in enumerate(content))


def _part(part: Any, path: str) -> str | Picture:
    if not isinstance(part, dict):
        raise RowError(path, "wrong_type", f"an object is expected, not {kind(part)} ({shown(part)})")
    match part.get("type"):
        case "text":
            return required(part, "text", str, f"{path}.")
        case "image_url":
            value = part.get("image_url")
            if isinstance(value, str):
                return Picture(value, f"{path}.image_url")
            value = required(part, "image_url", dict, f"{path}.")
            return Picture(required(value, "url", str, f"{path}.image_url."), f"{path}.image_url.url")
        case other:
            raise RowError(f"{path}.type", "unknown_part", f"text or image_url is expected, not {shown(other)}")
