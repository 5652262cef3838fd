"""ShareGPT rows, as LLaMA-Factory and LLaVA write them: conversations of from/value turns, or messages of role/content.

Each ``<image>`` in the user's turns stands for the next entry of ``images`` (LLaVA: ``image``); their numbers must
agree. In other turns it is literal text. ``system`` is the system prompt. Torch-free.
"""

from __future__ import annotations

from typing import Any, Literal

from vlm_dft.data.draft import PLACEHOLDER, Draft, Picture, Turn, required
from vlm_dft.data.problems import RowError, kind, shown

_ROLES: dict[str, Literal["system", "user", "assistant"]] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
_UNSUPPORTED = ("tools", "videos", "video", "audios", "audio", "chosen", "rejected")


def parse(record: dict[str, Any]) -> Draft:
    """One row. Raises RowError."""
    for name in _UNSUPPORTED:
        if record.get(name):
            raise RowError(name, "unsupported_field", f"{name} cannot be trained on here: remove the field")
    name = "conversations" if "conversations" in record or "messages" not in record else "messages"
    turns = required(record, name, list)
    if not turns:
        raise RowError(name, "no_messages", f"{name} is empty")
    pictures = _pictures(record)
    parsed = [_turn(turn, f"{name}.{index}") for index, turn in enumerate(turns)]
    _check_count(parsed, pictures, name)
    placed = _system(record, parsed)
    remaining = iter(pictures)
    for role, text, field in parsed:
        placed.append(Turn(role, _place(text, remaining) if role == "user" else (text,), field))
    return Draft(tuple(placed))


def _system(record: dict[str, Any], parsed: list[tuple[Any, str, str]]) -> list[Turn]:
    if record.get("system") in (None, ""):
        return []
    prompt = required(record, "system", str)
    if parsed[0][0] == "system":
        raise RowError("system", "two_system_prompts", "the row has a system field and a system turn: remove one")
    return [Turn("system", (prompt,), "system")]


def _turn(turn: Any, path: str) -> tuple[Literal["system", "user", "assistant"], str, str]:
    """(role, text, field of the text)"""
    if not isinstance(turn, dict):
        raise RowError(path, "wrong_type", f"an object is expected, not {kind(turn)} ({shown(turn)})")
    role_key, text_key = ("from", "value") if "from" in turn else ("role", "content")
    name = required(turn, role_key, str, f"{path}.")
    if name not in _ROLES:
        reason = f"{shown(name)} is no role of a training row; allowed are {', '.join(_ROLES)}"
        raise RowError(f"{path}.{role_key}", "unknown_role", reason)
    return _ROLES[name], required(turn, text_key, str, f"{path}."), f"{path}.{text_key}"


def _pictures(record: dict[str, Any]) -> list[Picture]:
    name = "images" if record.get("images") is not None else "image"
    value = record.get(name)
    if value is None:
        return []
    if isinstance(value, str):
        return [Picture(value, name)]
    if not isinstance(value, list):
        raise RowError(name, "wrong_type", f"a list of paths is expected, not {kind(value)} ({shown(value)})")
    for index, entry in enumerate(value):
        if not isinstance(entry, str):
            raise RowError(f"{name}.{index}", "wrong_type", f"a path is expected, not {kind(entry)} ({shown(entry)})")
    return [Picture(entry, f"{name}.{index}") for index, entry in enumerate(value)]


def _check_count(parsed: list[tuple[Any, str, str]], pictures: list[Picture], name: str) -> None:
    places = sum(text.count(PLACEHOLDER) for role, text, _ in parsed if role == "user")
    if places != len(pictures):
        reason = f"the user's turns have {places} {PLACEHOLDER} for {len(pictures)} pictures: their numbers must agree"
        raise RowError(name, "placeholder_mismatch", reason)


def _place(text: str, pictures: Any) -> tuple[str | Picture, ...]:
    first, *rest = text.split(PLACEHOLDER)
    content: list[str | Picture] = [first] if first else []
    for piece in rest:
        content.append(next(pictures))
        content += [piece] if piece else []
    return tuple(content)
