"""A small regression set: plain facts, reading, and looking, which a fine-tuning must not lose. Torch-free.

Sixty questions that any usable vision-language model answers: what is asked is easy on purpose, so that what breaks is
what the training broke. Pictures are drawn here, letters in the font that Pillow carries, so the set needs no download
and is the same everywhere. It is a custom benchmark; the category says which of the three an item is.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from PIL import Image, ImageDraw, ImageFont

NAME: Final = "regression"
OF_EACH: Final = 20
_SEED: Final = 20261124
_SIDE: Final = 336

_FACTS: Final = (
    ("What is the capital of France?", "Paris", ("London", "Rome", "Madrid")),
    ("What is the capital of Japan?", "Tokyo", ("Beijing", "Seoul", "Bangkok")),
    ("How many days are there in a week?", "7", ("5", "6", "8")),
    ("How many minutes are there in an hour?", "60", ("24", "30", "100")),
    ("At what temperature does water freeze at sea level, in degrees Celsius?", "0", ("10", "32", "100")),
    ("Which planet is closest to the Sun?", "Mercury", ("Venus", "Earth", "Mars")),
    ("Which gas do plants take from the air for photosynthesis?", "carbon dioxide", ("oxygen", "nitrogen", "helium")),
    ("How many sides does a hexagon have?", "6", ("5", "7", "8")),
    ("What is the largest ocean?", "the Pacific", ("the Atlantic", "the Indian Ocean", "the Arctic Ocean")),
    ("Which metal has the chemical symbol Fe?", "iron", ("gold", "tin", "lead")),
    ("Who wrote Romeo and Juliet?", "William Shakespeare", ("Charles Dickens", "Jane Austen", "Mark Twain")),
    ("How many legs does a spider have?", "8", ("4", "6", "10")),
    ("What do bees make?", "honey", ("milk", "silk", "wool")),
    ("Which organ pumps blood through the body?", "the heart", ("the liver", "the lung", "the kidney")),
    ("In which direction does the Sun rise?", "east", ("west", "north", "south")),
    ("What is the square root of 81?", "9", ("7", "8", "18")),
    ("Which language is mainly spoken in Brazil?", "Portuguese", ("Spanish", "French", "English")),
    ("How many continents are there in the seven-continent model?", "7", ("5", "6", "8")),
    ("What is frozen water called?", "ice", ("steam", "fog", "dew")),
    ("Which animal is the largest?", "the blue whale", ("the elephant", "the giraffe", "the white shark")),
)
_WORDS: Final = ("HARBOR", "LEMON", "WINTER", "PLANET", "GARDEN", "SILVER", "BRIDGE", "ORCHID", "TUNNEL", "MARBLE")
_COLOURS: Final = {"red": "#d02020", "green": "#189038", "blue": "#2050d0", "yellow": "#e8c020"}
_SHAPES: Final = ("circle", "square", "triangle")


def write(directory: Path) -> None:
    """Write benchmark.jsonl and images/ into an empty directory."""
    (directory / "images").mkdir(parents=True)
    generator = random.Random(_SEED)  # noqa: S311 - drawing, not secrecy
    rows = [*_facts(generator), *_reading(generator, directory), *_looking(generator, directory)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / "benchmark.jsonl").write_text(text, encoding="utf-8")


def _facts(generator: random.Random) -> Iterator[dict[str, Any]]:
    for number, (question, answer, others) in enumerate(_FACTS):
        yield _choice(generator, f"fact-{number}", "facts", question, answer, others)


def _reading(generator: random.Random, directory: Path) -> Iterator[dict[str, Any]]:
    """Words, numbers and a price on a picture."""
    for number in range(OF_EACH):
        if number < len(_WORDS):
            text, question, scoring = _WORDS[number], "Which word is written in the picture?", "exact"
        else:
            text, question, scoring = str(generator.randrange(100, 10_000)), "Which number is in the picture?", "number"
        picture = Image.new("RGB", (_SIDE, _SIDE), "white")
        place = (generator.randrange(20, 60), generator.randrange(60, 220))
        ImageDraw.Draw(picture).text(place, text, fill="black", font=ImageFont.load_default(56))
        row = {"id": f"ocr-{number}", "category": "ocr", "question": question, "answer": text, "scoring": scoring}
        yield {**row, "image": _keep(picture, directory, f"ocr-{number}")}


def _looking(generator: random.Random, directory: Path) -> Iterator[dict[str, Any]]:
    """How many, of which colour, which shape."""
    for number in range(OF_EACH):
        count, shape = generator.randrange(2, 7), generator.choice(_SHAPES)
        colour = generator.choice(list(_COLOURS))
        image = _keep(_draw(generator, count, shape, _COLOURS[colour]), directory, f"general-{number}")
        id, kind = f"general-{number}", number % 3
        if kind == 0:
            row = {"id": id, "category": "general", "answer": str(count), "scoring": "number"}
            yield {**row, "question": f"How many {shape}s are in the picture?", "image": image}
            continue
        question, answer, all_of_it = (
            ("Which colour do the shapes have?", colour, tuple(_COLOURS))
            if kind == 1
            else ("Which shape do all figures have?", shape, _SHAPES)
        )
        others = tuple(other for other in all_of_it if other != answer)
        yield {**_choice(generator, id, "general", question, answer, others), "image": image}


def _choice(
    generator: random.Random, id: str, category: str, question: str, answer: str, others: tuple[str, ...]
) -> dict[str, Any]:
    options = [answer, *others]
    generator.shuffle(options)
    letter = "ABCD"[options.index(answer)]
    return {"id": id, "category": category, "question": question, "options": options, "answer": letter}


def _draw(generator: random.Random, count: int, shape: str, colour: str) -> Image.Image:
    """Figures of one kind, one to a cell of a 3 x 3 grid: none touches another."""
    picture = Image.new("RGB", (_SIDE, _SIDE), "white")
    draw = ImageDraw.Draw(picture)
    cell = _SIDE // 3
    for place in generator.sample(range(9), count):
        radius = generator.randrange(24, 44)
        x, y = place % 3 * cell + cell // 2, place // 3 * cell + cell // 2
        box = (x - radius, y - radius, x + radius, y + radius)
        if shape == "circle":
            draw.ellipse(box, fill=colour)
        elif shape == "square":
            draw.rectangle(box, fill=colour)
        else:
            draw.polygon(((x, y - radius), (x - radius, y + radius), (x + radius, y + radius)), fill=colour)
    return picture


def _keep(picture: Image.Image, directory: Path, name: str) -> str:
    path = f"images/{name}.png"
    picture.save(directory / path, "PNG")
    return path
