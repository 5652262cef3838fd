"""WeThink's raw rows: problem, answer, category, abilities, refined_cot, image_path, reward. Torch-free.

The assistant's text becomes ``<think>\\n...\\n</think>\\n<answer>\\n...\\n</answer>``; tags that refined_cot already
holds are taken off first, so that they are there once. The first ``<image>`` in problem is the picture's place, without
one the picture comes first; any other media tag is literal text: it stays text, and never counts as a picture.
abilities and reward are not used.
"""

from __future__ import annotations

import json
import re
from typing import Any

from vlm_dft.data.draft import PLACEHOLDER, Draft, Picture, Turn, required
from vlm_dft.data.problems import RowError, kind, shown

KEYS = frozenset({"problem", "answer", "refined_cot"})
"""A row with these is a WeThink row."""

SYSTEM_PROMPT = (
    "Reason before you answer. Write your reasoning between <think> and </think>, then give only the final answer "
    "between <answer> and </answer>."
)

_ANSWER_BLOCK = re.compile(r"<answer>.*?</answer>", re.DOTALL | re.IGNORECASE)
_ANSWER_TAG = re.compile(r"</?answer>", re.IGNORECASE)
_THINK_TAG = re.compile(r"</?think>", re.IGNORECASE)


def parse(record: dict[str, Any]) -> Draft:
    """One row. Raises RowError."""
    problem = required(record, "problem", str)
    answer = _answer(record)
    reasoning = _reasoning(required(record, "refined_cot", str))
    pictures = _pictures(record)
    content = place_pictures(problem, pictures, "problem")
    if not any(isinstance(part, str) and part.strip() for part in content):
        raise RowError("problem", "empty_problem", f"nothing is left of the problem {shown(problem)}")
    reply = f"<think>\n{reasoning}\n</think>\n<answer>\n{answer}\n</answer>"
    turns = (Turn("user", content, "problem"), Turn("assistant", (reply,), "refined_cot"))
    return Draft(turns, answer=answer, category=_category(record.get("category")), default_system=SYSTEM_PROMPT)


def _answer(record: dict[str, Any]) -> str:
    value = record.get("answer")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)  # some converters write numeric answers as numbers
    elif not isinstance(value, str):
        raise RowError("answer", "wrong_type", f"a string or a number is expected, not {kind(value)} ({shown(value)})")
    answer = _ANSWER_TAG.sub("", value).strip()
    if not answer:
        raise RowError("answer", "empty_answer", f"nothing is left of the answer {shown(value)}")
    return answer


def _reasoning(refined_cot: str) -> str:
    without_block = _ANSWER_BLOCK.sub("", refined_cot)
    if _ANSWER_TAG.search(without_block):
        reason = "an <answer> tag has no counterpart: what belongs to the reasoning cannot be told, close or remove it"
        raise RowError("refined_cot", "malformed_tags", reason)
    reasoning = _THINK_TAG.sub("", without_block).strip()
    if not reasoning:
        raise RowError("refined_cot", "empty_reasoning", f"nothing is left of the reasoning {shown(refined_cot)}")
    return reasoning


def _pictures(record: dict[str, Any]) -> list[Picture]:
    value = record.get("image_path")
    paths: list[Any] = value if isinstance(value, list) else [value]
    if not paths or not all(isinstance(path, str) and path for path in paths):
        reason = f"a path, or a list of paths, is expected, not {kind(value)} ({shown(value)})"
        raise RowError("image_path", "image_missing", reason)
    if len(paths) == 1:
        return [Picture(paths[0], "image_path")]
    return [Picture(path, f"image_path.{index}") for index, path in enumerate(paths)]


def place_pictures(text: str, pictures: list[Picture], field: str) -> tuple[str | Picture, ...]:
    """Pictures at the text's first placeholders, or before a text that has none. Raises RowError for too few places."""
    pieces = text.split(PLACEHOLDER, len(pictures))
    if len(pieces) == 1:
        return (*pictures, text)
    if len(pieces) - 1 < len(pictures):
        reason = f"the text has {len(pieces) - 1} {PLACEHOLDER} for {len(pictures)} pictures"
        raise RowError(field, "placeholder_mismatch", reason)
    content: list[str | Picture] = []
    for piece, picture in zip(pieces, [*pictures, None], strict=True):
        content += [piece] if piece else []
        content += [picture] if picture else []
    return tuple(content)


def _category(value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value or None
    return json.dumps(value, ensure_ascii=False)
