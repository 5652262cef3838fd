"""Seeded problems with balanced answers, for training and held out, and the level of blind guessing. Torch-free.

A problem is a scene, a question, and where the question's facts are: in the picture, in the text too, or the question
itself stands in the picture. Knows nothing about files (``write``).
"""

from __future__ import annotations

import io
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from itertools import cycle, islice
from random import Random
from typing import Literal

from PIL import Image

from vlm_dft.demo import wording
from vlm_dft.demo.questions import KINDS, Count, Height, Question, Together, Total
from vlm_dft.demo.scenes import Scene, draw, is_held_out, seeded

Version = Literal["Text Dominant", "Vision Intensive", "Vision Only"]
"""MathVerse's words: the facts are told; the picture is needed; the question stands in it."""
VERSIONS: tuple[Version, ...] = ("Text Dominant", "Vision Intensive", "Vision Only")


@dataclass(frozen=True)
class Problem:
    """One problem with its only right answer."""

    scene: Scene
    question: Question
    version: Version = "Vision Intensive"
    options: tuple[str, ...] = ()
    """Shuffled values, one of them right; empty: free form."""
    seed: str = ""
    """Of the picture's jitter and of the phrasing of the reasoning."""

    @property
    def answer(self) -> str:
        answer = self.question.answer(self.scene)
        assert answer is not None, f"{self.question} has no answer in {self.scene}"
        return answer

    @property
    def letter(self) -> str:
        """Of the right option."""
        return wording.LETTERS[self.options.index(self.answer)]

    @property
    def text(self) -> str:
        """The question, with what is told; empty when it stands in the picture."""
        if self.version == "Vision Only":
            return ""
        return wording.stated(self.scene, self.question, given=self.version == "Text Dominant")

    @cached_property
    def image(self) -> Image.Image:
        caption = self.question.caption if self.version == "Vision Only" else ""
        return draw(self.scene, caption, jitter=seeded(self.seed))

    def png(self) -> bytes:
        file = io.BytesIO()
        self.image.save(file, "PNG")
        return file.getvalue()

    def reasoning(self) -> str:
        given = self.version == "Text Dominant"
        return wording.reasoning(self.scene, self.question, given=given, random=seeded(self.seed))


def problems(kind: type[Question], number: int, *, held_out: bool, random: Random) -> list[Problem]:
    """Problems of one kind, on one side, each of its answers equally often (but for the rest of the division)."""
    return [_with_answer(kind, answer, held_out, random) for answer in islice(cycle(kind.answers), number)]


def _with_answer(kind: type[Question], answer: str, held_out: bool, random: Random) -> Problem:
    while True:
        scene, question = kind.random(random)
        if question.answer(scene) == answer and is_held_out(scene) is held_out:
            return Problem(scene, question, seed=f"{random.getrandbits(64):x}")


def with_options(problem: Problem, random: Random) -> Problem:
    """The same problem with five options, in any order."""
    options = [*problem.question.answers, problem.question.distractor]
    random.shuffle(options)
    return replace(problem, options=tuple(options))


def mixture(number: int, *, held_out: bool, random: Random, kinds: Sequence[type[Question]] = KINDS) -> list[Problem]:
    """Problems of all kinds equally often, in any order."""
    found: list[Problem] = []
    for index, kind in enumerate(kinds):
        found += problems(kind, len(range(index, number, len(kinds))), held_out=held_out, random=random)
    random.shuffle(found)
    return found


def steps_of(problem: Problem) -> tuple[Problem, Problem]:
    """A two-step problem's steps, each asked alone: reading the first number, and adding two that are told."""
    question = problem.question
    assert isinstance(question, Together | Total), f"{question} has one step"
    first = Count(question.first) if isinstance(question, Together) else Height(question.first)
    return replace(problem, question=first), replace(problem, version="Text Dominant")


def guesses(asked: Iterable[Problem]) -> dict[type[Question], str]:
    """The best blind guess: for each kind of question the answer that it has most often."""
    counts: dict[type[Question], Counter[str]] = defaultdict(Counter)
    for problem in asked:
        counts[type(problem.question)][problem.answer] += 1
    return {kind: count.most_common(1)[0][0] for kind, count in counts.items()}


def chance(asked: Sequence[Problem]) -> Fraction:
    """Share of right answers of whoever knows the kinds and how often each answer comes, and sees nothing."""
    guess = guesses(asked)
    return Fraction(sum(guess[type(problem.question)] == problem.answer for problem in asked), len(asked))
