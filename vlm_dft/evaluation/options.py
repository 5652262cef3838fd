"""Which option of a multiple-choice question a response chose, by VLMEvalKit's rule. Torch-free.

The rule, in order: an API failure names no letter; a refusal chooses Z; exactly one option letter standing alone, among
the last words; Z standing alone; "answer is X" with X in A-D; exactly one option whose text occurs in a short response.
Its known blindness is kept: "A" as an article counts as a letter, and so does a letter named only to reject it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
REJECTED = "Z"
LAST_WORDS = 4
FAILURE = "Failed to obtain answer via API"
# What hosted models answer instead of an answer; the strings that VLMEvalKit looks for.
REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_SEPARATORS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_SPELLED_OUT = re.compile(r"answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)


def infer_option(response: str, options: Mapping[str, str]) -> str | None:
    """The letter chosen, Z for a refusal, None when the rule finds none. options: letter -> text."""
    if FAILURE in response:
        return _by_text(response, options)
    if any(refusal in response for refusal in REFUSALS):
        return REJECTED
    return _by_letter(response, options) or _by_phrase(response, options) or _by_text(response, options)


def _by_letter(response: str, options: Mapping[str, str]) -> str | None:
    words = response.translate(_SEPARATORS).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1 and words.index(named[0]) >= len(words) - LAST_WORDS:
        return named[0]
    return REJECTED if not named and REJECTED in words else None


def _by_phrase(response: str, options: Mapping[str, str]) -> str | None:
    found = _SPELLED_OUT.search(response)
    letter = found.group(1).upper() if found else None
    return letter if letter in options else None


def _by_text(response: str, options: Mapping[str, str]) -> str | None:
    if len(response) > 2 * sum(len(text) for text in options.values()):
        return None
    lowered = response.lower()
    named = [letter for letter, text in options.items() if text.lower() in lowered]
    return named[0] if len(named) == 1 else None
