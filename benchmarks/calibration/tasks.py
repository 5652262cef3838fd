"""Text tasks whose best objective can be found by training: what a base model knows, and what it is then shown.

A task is a base, demonstrations to fine-tune on, and questions to score by. Some demonstrations are wrong, where the
task says so: that is what a weight by the model's own probability can ignore.
Knows nothing about models or training (``arms``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Final

Pair = tuple[str, str]
"""A question and its answer."""
Told = Callable[[Random, int, int, int, int], str]
"""How a sum of three digits and its total are told."""

_SYLLABLES: Final = ("ba", "do", "fi", "ga", "ku", "le", "mi", "no", "pa", "ra", "su", "ti", "vo", "we", "zu", "ha")
_WORDINGS: Final = ("Add {0}, {1} and {2}.", "What is {0} + {1} + {2}?", "Sum up {0}, {1}, {2}.")
_OPENERS: Final = (
    *("First", "To begin", "Well", "So", "Now", "Then", "Look", "Here", "Step by step", "Easy", "Count", "Good"),
    *("Start", "Right", "Fine", "Sure"),
)


@dataclass(frozen=True)
class Base:
    """What a random model is trained on to become a base model."""

    name: str
    corpus: list[Pair]
    steps: int


@dataclass(frozen=True)
class Task:
    """One task of one seed."""

    base: Base
    demonstrations: list[Pair]
    questions: list[Pair]
    """Asked after the training; right when the scored part of the answer is the same."""
    score: Callable[[str], str]
    """The part of an answer that is compared."""
    epochs: int = 12


def _plain(_: Random, first: int, second: int, third: int, total: int) -> str:
    return f"{first} + {second} is {first + second}. {first + second} + {third} is {total}. So it is {total}."


def _varied(random: Random, *numbers: int) -> str:
    return f"{random.choice(_OPENERS)}, {_plain(random, *numbers)}"


def _tagged(_: Random, first: int, second: int, third: int, total: int) -> str:
    reasoning = f"{first} + {second} is {first + second}. {first + second} + {third} is {total}."
    return f"<think>{reasoning}</think><answer>{total}</answer>"


def _endless(random: Random, *numbers: int) -> str:
    return f"{_varied(random, *numbers)} And {random.randrange(10)} is {random.randrange(10)}."


def _sum(random: Random, told: Told, wrong: float = 0.0) -> Pair:
    """wrong: how often the total is another number."""
    first, second, third = (random.randrange(10) for _ in range(3))
    total = first + second + third
    if random.random() < wrong:
        total = random.choice([number for number in range(28) if number != total])
    return random.choice(_WORDINGS).format(first, second, third), told(random, first, second, third, total)


def _last_number(text: str) -> str:
    """The total, when the answer ends with it."""
    return text.rsplit("So it is ", 1)[-1] if "So it is " in text else ""


def _tagged_number(text: str) -> str:
    """The total, when it stands in tags at the end of the answer."""
    return text.rsplit("<answer>", 1)[-1] if "<answer>" in text and text.endswith("</answer>") else ""


def _sums(
    seed: int,
    *,
    base: Told = _plain,
    steps: int = 450,
    demonstrations: Told = _plain,
    wrong: float = 0.3,
    epochs: int = 12,
) -> Task:
    known = Random(f"{base.__name__} {seed}")
    random = Random(f"{base.__name__} {demonstrations.__name__} {wrong} {seed}")
    return Task(
        base=Base(f"sums{base.__name__}_{steps}", [_sum(known, base) for _ in range(8000)], steps),
        demonstrations=[_sum(random, demonstrations, wrong) for _ in range(256)],
        questions=[_sum(random, demonstrations) for _ in range(200)],
        score=_tagged_number if demonstrations is _tagged else _last_number,
        epochs=epochs,
    )


def _facts(seed: int, *, places: int) -> Task:
    random = Random(f"facts {places} {seed}")
    people, towns = _names(random, 240), _names(random, places)
    pairs = [(f"Where does {person} live?", f"{person} lives in {random.choice(towns)}.") for person in people]
    new = pairs[:96]
    base = Base(f"facts_{places}", pairs[96:], 300)
    return Task(base, new, new, lambda text: text.rsplit(" lives in ", 1)[-1], epochs=30)


def _blank(seed: int) -> Task:
    facts = _facts(seed, places=8)
    shown = [(question, f"<answer>{answer}</answer>") for question, answer in facts.demonstrations]
    base = Base("nothing", facts.base.corpus, 1)
    return Task(base, shown, shown, lambda text: text.rsplit(" lives in ", 1)[-1], epochs=60)


def _homes(seed: int, *, known: bool) -> Task:
    """Demonstrations of people whom the base knows well, three in ten wrong; or of others. Seconds to train."""
    random = Random(f"homes {seed}")
    people, towns = _names(random, 96), _names(random, 64)
    pairs = [(f"Where does {person} live?", f"{person} lives in {random.choice(towns)}.") for person in people]
    asked = pairs[:48] if known else pairs[48:]
    shown = list(asked)
    for index in range(0, 14 if known else 0):
        question, answer = asked[index]
        shown[index] = (question, answer.split(" lives in ")[0] + f" lives in {random.choice(towns)}.")
    base = Base("homes", pairs[:48], 90)
    return Task(base, shown, asked, lambda text: text.rsplit(" lives in ", 1)[-1], epochs=20 if known else 50)


def _names(random: Random, number: int) -> list[str]:
    """Different made-up names."""
    found: dict[str, None] = {}
    while len(found) < number:
        found["".join(random.choice(_SYLLABLES) for _ in range(3))] = None
    return list(found)


TASKS: Final[dict[str, Callable[[int], Task]]] = {
    "facts": partial(_facts, places=96),
    "practised": _sums,
    "new_format": partial(_sums, demonstrations=_tagged, epochs=40),
    "few_facts": partial(_facts, places=8),
    "varied": partial(_sums, base=_varied, demonstrations=_varied),
    "no_stop": partial(_sums, base=_endless, demonstrations=_varied),
    "clean": partial(_sums, wrong=0.0),
    "weak": partial(_sums, steps=150),
    "blank": _blank,
    "known_homes": partial(_homes, known=True),
    "new_homes": partial(_homes, known=False),
}
"""facts: where people live whom the base has never heard of, among 96 places that it knows. few_facts: among 8.
practised: the base adds well, three in ten demonstrations are wrong. varied: they open in one of sixteen ways, too.
new_format: the answers stand between tags that the base has never written. no_stop: as varied, and they end where the
base goes on. clean: none is wrong. weak: the base has only begun to learn to add. blank: the base knows nothing, and
the answers stand between tags. known_homes and new_homes: practised and facts made small, on one base; a test trains
them again."""
