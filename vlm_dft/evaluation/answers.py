"""Where the answer stands in a response. Torch-free, no judge.

One order for every benchmark:

1. the last closed ``<answer>...</answer>``;
2. the last ``\\boxed{...}`` with balanced braces (inside the tag, too);
3. no mark: the response itself, by the benchmark's own rule, which is VLMEvalKit's;
4. where that rule finds nothing and the benchmark has no rule for everything: what follows the last "answer is" or
   "answer:".

Reasoning is no answer: marks are looked for after the last ``</think>``, and a response whose ``<think>`` never closed
has no answer at all.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

Rule = Literal["answer_tag", "boxed", "benchmark", "phrase", "math_verify", "judge", "none"]

_ANSWER_TAG = re.compile(r"</?answer>", re.IGNORECASE)
_THINK_END = "</think>"
_THINK_START = "<think>"
_BOXED = re.compile(r"\\(?:boxed|fbox)\s{0,3}\{")
_BRACE = re.compile(r"[{}]")
_PHRASE = re.compile(r"\banswer\s{0,3}(?:is|:|=)\s{0,3}:?", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\.(?:\s|$)|\n")
_DECORATION = " \t*$\"'`.,;:"


class Marked(NamedTuple):
    """An answer that the model marked as such."""

    text: str
    rule: Rule


def without_reasoning(response: str) -> str:
    """What follows the last </think>; nothing when reasoning was begun and never ended."""
    _, ended, after = response.rpartition(_THINK_END)
    return "" if _THINK_START in after else after if ended else response


def marked_answer(response: str) -> Marked | None:
    """The answer by rules 1 and 2, unless it is empty. response: without reasoning."""
    tagged = _last_tagged(response)
    boxed = _last_boxed(response if tagged is None else tagged)
    text = (tagged if boxed is None else boxed) or ""
    return Marked(text.strip(), "boxed" if tagged is None else "answer_tag") if text.strip() else None


def phrased_answer(response: str) -> str | None:
    """The answer by rule 4: to the end of the sentence or line, without surrounding marks."""
    phrases = list(_PHRASE.finditer(response))
    if not phrases:
        return None
    after = response[phrases[-1].end() :].lstrip()
    end = _SENTENCE_END.search(after)
    text = after[: end.start()] if end else after
    return text.strip(_DECORATION) or None


def _last_tagged(response: str) -> str | None:
    end = None
    for tag in reversed(list(_ANSWER_TAG.finditer(response))):
        if tag.group().startswith("</"):
            end = tag.start()
        elif end is not None:
            return response[tag.end() : end]
    return None


def _last_boxed(response: str) -> str | None:
    """One pass with a stack of open braces: a response of a million braces costs a million steps, not their square."""
    boxed = {opening.end() - 1 for opening in _BOXED.finditer(response)}
    if not boxed:
        return None
    last = None
    open_braces: list[int] = []
    for brace in _BRACE.finditer(response):
        if brace.group() == "{":
            open_braces.append(brace.start())
        elif open_braces:
            start = open_braces.pop()
            last = (start + 1, brace.start()) if start in boxed else last
    return response[last[0] : last[1]] if last else None
