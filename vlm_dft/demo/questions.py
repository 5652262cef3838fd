"""What is asked about a scene, its answer, and the facts that a text may give instead of the picture. Torch-free.

Every kind of question has four answers, asked for equally often, so that a guess is right one time in four.
Knows nothing about wording beyond the question itself (``wording``) and nothing about files.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import ClassVar

from vlm_dft.demo.scenes import COLOURS, Chart, Grid, Scene, random_chart, random_grid

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")


def paired(colour: str, number: int) -> str:
    """How facts and reasoning tell a number, as "red three": two tokens side by side, so that one leads to the other.

    Qwen's tokenizer puts a token between a word and a digit, which a tiny model is slow to look over.
    """
    return f"{colour} {NUMBERS[number]}"


@dataclass(frozen=True)
class Question:
    """One question; what a scene must be like for it is checked by ``answer``."""

    answers: ClassVar[tuple[str, ...]] = ("1", "2", "3", "4")
    distractor: ClassVar[str] = "5"
    """A fifth option, never right."""
    subject: ClassVar[str]
    """MathVision's and MathVerse's word for it."""
    concept: ClassVar[str]
    """We-Math's."""
    level: ClassVar[int]
    """Steps of reasoning."""

    @classmethod
    def random(cls, random: Random) -> tuple[Scene, Question]:
        """A scene, and a question about it that may not have an answer."""
        raise NotImplementedError

    def answer(self, scene: Scene) -> str | None:
        """None when the question makes no sense for the scene."""
        raise NotImplementedError

    @property
    def text(self) -> str:
        raise NotImplementedError

    @property
    def caption(self) -> str:
        """The question as it fits into the picture."""
        raise NotImplementedError

    def facts(self, scene: Scene) -> str:
        """What the picture shows, said in words: with it, the question needs no picture."""
        raise NotImplementedError


@dataclass(frozen=True)
class Count(Question):
    """How many shapes have one colour."""

    subject = "counting"
    concept = "Counting"
    level = 1
    colour: str

    @classmethod
    def random(cls, random: Random) -> tuple[Scene, Question]:
        return random_grid(random), cls(random.choice(sorted(COLOURS)))

    def answer(self, scene: Scene) -> str | None:
        return str(scene.num_of(self.colour)) if isinstance(scene, Grid) else None

    @property
    def text(self) -> str:
        return f"How many {self.colour} shapes are there?"

    @property
    def caption(self) -> str:
        return f"How many\n{self.colour} shapes?"

    def facts(self, scene: Scene) -> str:
        assert isinstance(scene, Grid), "a Count is about a grid"
        shapes = [f"{shape.colour} {shape.form}" for shape in scene.places if shape]
        return f"The picture shows {', '.join(shapes)}."


@dataclass(frozen=True)
class Together(Question):
    """How many shapes have one of two colours."""

    answers = ("2", "3", "4", "5")
    distractor = "6"
    subject = "arithmetic"
    concept = "Addition"
    level = 2
    first: str
    second: str

    @classmethod
    def random(cls, random: Random) -> tuple[Scene, Question]:
        return random_grid(random), cls(*random.sample(sorted(COLOURS), 2))

    def parts(self, scene: Scene) -> tuple[int, int]:
        assert isinstance(scene, Grid), "a Together is about a grid"
        return scene.num_of(self.first), scene.num_of(self.second)

    def answer(self, scene: Scene) -> str | None:
        """None, too, when a colour is absent: then it would be a question of counting one."""
        if not isinstance(scene, Grid) or 0 in self.parts(scene):
            return None
        return str(sum(self.parts(scene)))

    @property
    def text(self) -> str:
        return f"How many {self.first} and {self.second} shapes are there together?"

    @property
    def caption(self) -> str:
        return f"{self.first} and\n{self.second} shapes?"

    def facts(self, scene: Scene) -> str:
        one, two = self.parts(scene)
        return f"The shapes are {paired(self.first, one)} and {paired(self.second, two)}."


@dataclass(frozen=True)
class Height(Question):
    """How high one bar is."""

    subject = "statistics"
    concept = "Reading Bar Charts"
    level = 1
    colour: str

    @classmethod
    def random(cls, random: Random) -> tuple[Scene, Question]:
        chart = random_chart(random)
        return chart, cls(random.choice(chart.bars).colour)

    def answer(self, scene: Scene) -> str | None:
        height = scene.height_of(self.colour) if isinstance(scene, Chart) else None
        return None if height is None else str(height)

    @property
    def text(self) -> str:
        return f"How high is the {self.colour} bar?"

    @property
    def caption(self) -> str:
        return f"How high is\nthe {self.colour} bar?"

    def facts(self, scene: Scene) -> str:
        return _heights(scene)


@dataclass(frozen=True)
class Total(Question):
    """How high two bars are together."""

    answers = ("3", "4", "5", "6")
    distractor = "9"
    subject = "arithmetic"
    concept = "Addition"
    level = 2
    first: str
    second: str

    @classmethod
    def random(cls, random: Random) -> tuple[Scene, Question]:
        chart = random_chart(random)
        first, second = random.sample([bar.colour for bar in chart.bars], 2)
        return chart, cls(first, second)

    def parts(self, scene: Scene) -> tuple[int, int]:
        assert isinstance(scene, Chart), "a Total is about a chart"
        heights = {bar.colour: bar.height for bar in scene.bars}
        return heights[self.first], heights[self.second]

    def answer(self, scene: Scene) -> str | None:
        return str(sum(self.parts(scene))) if isinstance(scene, Chart) else None

    @property
    def text(self) -> str:
        return f"How high are the {self.first} and {self.second} bars together?"

    @property
    def caption(self) -> str:
        return f"{self.first} and\n{self.second} bars?"

    def facts(self, scene: Scene) -> str:
        one, two = self.parts(scene)
        return f"The bars are {paired(self.first, one)} and {paired(self.second, two)}."


@dataclass(frozen=True)
class Highest(Question):
    """Which bar is the highest, by its colour."""

    answers = tuple(COLOURS)
    distractor = "none"
    subject = "statistics"
    concept = "Comparing Bars"
    level = 1

    @classmethod
    def random(cls, random: Random) -> tuple[Scene, Question]:
        return random_chart(random), cls()

    def answer(self, scene: Scene) -> str | None:
        """None, too, when two bars are the highest."""
        if not isinstance(scene, Chart):
            return None
        top = max(bar.height for bar in scene.bars)
        highest = [bar.colour for bar in scene.bars if bar.height == top]
        return highest[0] if len(highest) == 1 else None

    @property
    def text(self) -> str:
        return "Which bar is the highest?"

    @property
    def caption(self) -> str:
        return "Which bar is\nthe highest?"

    def facts(self, scene: Scene) -> str:
        return _heights(scene)


def _heights(scene: Scene) -> str:
    assert isinstance(scene, Chart), "heights are a chart's"
    return f"The bars are {', '.join(paired(bar.colour, bar.height) for bar in scene.bars)}."


KINDS: tuple[type[Question], ...] = (Count, Together, Height, Total, Highest)
