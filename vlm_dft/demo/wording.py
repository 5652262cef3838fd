"""How a problem is put to the model, and how its reasoning is told: several phrasings for every step. Torch-free.

The forms in which problems are put are those in which the three benchmarks are asked (``vlm_dft.evaluation``): a tiny
model has no other language to generalise from. Which phrasing comes is chance, and not to be predicted: that is what
tells DFT from SFT, which spends its effort on all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from vlm_dft.demo.questions import NUMBERS, Count, Height, Highest, Question, Together, Total, paired
from vlm_dft.demo.scenes import COLUMNS, Chart, Scene, Shape

SYSTEM_PROMPT = "Reason, then answer."
"""Short: at 80 tokens a sample, WeThink's own would be a third of the work."""
LETTERS = "ABCDE"

DIRECT = "Please directly answer the question and provide the final value, e.g., 1, 2.5, 300."
"""MathVerse's words before a free-form question."""
REASONED = (
    "Please first conduct reasoning, and then answer the question and provide the final value, e.g., 1, 2.5, 300, "
    "at the end."
)
IN_PICTURE = "According to the question shown in the image, please "
ONLY_ANSWER = "Give only the final answer, in \\boxed{}; of several options, its letter."
"""The evaluation's words after a MathVision question."""

_OPENERS = (
    "Wanted: {wanted}.",
    "I look for {wanted}.",
    "The question is about {wanted}.",
    "Asked for is {wanted}.",
    "Search {wanted} in the picture.",
)
_GIVEN = (
    "The text says what is needed.",
    "No need to look, it is given.",
    "This is known from the question.",
)
_ROWS = (
    ("Top row:", "Bottom row:"),
    ("The top row has", "The bottom row has"),
    ("In the first row I see", "In the second row I see"),
    ("Above:", "Below:"),
    ("Row one holds", "Row two holds"),
)
_BARS = ("The bars are", "From left to right:", "I read", "Heights:")
_COUNTED = ("So it is {pair}.", "I count {pair}.", "Counting gives {pair}.", "That makes {pair}.")
_ADDED = (
    "{first} and {second} make {sum}.",
    "There are {first} and {second}, so {sum} together.",
    "Adding {first} and {second} gives {sum}.",
    "With {first} and {second}, the sum is {sum}.",
)
_READ = ("So it is {pair}.", "The height is {pair}.", "This gives {pair}.")
_HIGHEST = ("So {answer} is the highest.", "The highest is {answer}.", "No bar is higher than {answer}.")


def reasoning(scene: Scene, question: Question, *, given: bool, random: Random) -> str:
    """What leads to the answer. given: the question's text holds the facts, so the picture is not read."""
    opener = random.choice(_OPENERS).format(wanted=_wanted(question))
    read = random.choice(_GIVEN) if given else _read_out(scene, random)
    return " ".join([opener, read, _conclusion(scene, question, random)])


def _wanted(question: Question) -> str:
    """What the question asks for, said again before the picture is read: a tiny model finds it there more easily."""
    if isinstance(question, Together | Total):
        return f"{question.first} and {question.second}"
    return question.colour if isinstance(question, Count | Height) else "the highest"


def _read_out(scene: Scene, random: Random) -> str:
    """The whole scene in words, so that every place of the picture is supervised."""
    if isinstance(scene, Chart):
        return f"{random.choice(_BARS)} {', '.join(paired(bar.colour, bar.height) for bar in scene.bars)}."
    above, below = random.choice(_ROWS)
    return f"{above} {_listed(scene.places[:COLUMNS])}. {below} {_listed(scene.places[COLUMNS:])}."


def _listed(places: Sequence[Shape | None]) -> str:
    return ", ".join(f"{shape.colour} {shape.form}" if shape else "nothing" for shape in places)


def _conclusion(scene: Scene, question: Question, random: Random) -> str:
    answer = question.answer(scene)
    assert answer is not None, f"{question} has no answer in {scene}"
    if isinstance(question, Together | Total):
        one, two = question.parts(scene)
        first, second = paired(question.first, one), paired(question.second, two)
        return random.choice(_ADDED).format(first=first, second=second, sum=NUMBERS[one + two])
    if isinstance(question, Count | Height):
        words = _COUNTED if isinstance(question, Count) else _READ
        return random.choice(words).format(pair=paired(question.colour, int(answer)))
    assert isinstance(question, Highest), f"no conclusion for {question}"
    return random.choice(_HIGHEST).format(answer=answer)


def stated(scene: Scene, question: Question, *, given: bool) -> str:
    """The question, after the facts when they are given."""
    return f"{question.facts(scene)} {question.text}" if given else question.text


def as_mathverse(text: str, *, reason_first: bool = False) -> str:
    """MathVerse's query for a free-form question; an empty text stands in the picture."""
    words = REASONED if reason_first else DIRECT
    return f"{words}\nQuestion: {text}" if text else IN_PICTURE + words[len("Please ") :]


def as_wethink(text: str, options: Sequence[str]) -> str:
    """The question alone, or with its options as WeThink lists them."""
    return "\n".join([text, *(["Options:"] if options else []), *_lettered(options)])


def _lettered(options: Sequence[str]) -> list[str]:
    return [f"({letter}) {option}" for letter, option in zip(LETTERS, options, strict=False)]


def as_mathvision(text: str, options: Sequence[str]) -> str:
    """A MathVision question as the evaluation asks it."""
    return "\n".join([mathvision_question(text), *_lettered(options), ONLY_ANSWER])


def mathvision_question(text: str) -> str:
    """MathVision marks the picture's place in its text."""
    return f"{text}\n<image1>"


def as_wemath(text: str, options: Sequence[str]) -> str:
    """A We-Math question as the evaluation asks it."""
    listed = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([f"Question: {text}", "Options:", *listed]) + "\n"
