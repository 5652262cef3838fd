"""Whether two scores may be compared: same items, asked, generated, pictured and graded in the same way. Torch-free."""

from __future__ import annotations

from typing import Any

from vlm_dft.results import Score

_SAME = (
    "kind",
    "metric",
    "scorer",
    "judge",
    "prompt",
    "pixels",
    "image_backend",
    "n",
    "n_total",
    "whole",
    "items_sha256",
)
_IRRELEVANT = ("batch_size",)
"""Generation settings that change speed, not answers."""


def comparable(first: Score, second: Score) -> str | None:
    """Why the two must not be compared; None when they may."""
    for name in _SAME:
        if getattr(first, name) != getattr(second, name):
            return _differ(name, getattr(first, name), getattr(second, name))
    settings = (first.generation.keys() | second.generation.keys()) - set(_IRRELEVANT)
    for name in sorted(settings):
        if first.generation.get(name) != second.generation.get(name):
            return _differ(f"generation.{name}", first.generation.get(name), second.generation.get(name))
    return None


def _differ(name: str, first: Any, second: Any) -> str:
    return f"{name} differs: {first!r} and {second!r}"
