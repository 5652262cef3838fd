"""Small canonical datasets for tests of any part that trains or evaluates: ``sums_dataset``, ``shapes_dataset``.

They are written here directly, in the form that ``vlm_dft.data.canonical`` documents, so that training can be tested
without the validation that writes them in real life.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from vlm_dft.data.canonical import IMAGES_NAME, MANIFEST_NAME, ROWS_NAME, ImagePart, Manifest, Message, Row, TextPart

COLOURS = ("red", "green", "blue", "yellow")


def write_dataset(path: Path, rows: Sequence[Row]) -> Path:
    """A complete canonical dataset at path, its pictures being those that picture_row has put below it."""
    path.mkdir(parents=True, exist_ok=True)
    lines = [row.model_dump_json() + "\n" for row in rows]
    (path / ROWS_NAME).write_text("".join(lines))
    digest = hashlib.sha256("".join(lines).encode()).hexdigest()
    manifest = Manifest(rows=len(rows), format="openai", filename="test.jsonl", image_root=".", fingerprint=digest)
    (path / MANIFEST_NAME).write_text(manifest.model_dump_json())
    return path


def text_row(number: int, question: str, answer: str, *, train: bool = True, system: str | None = None) -> Row:
    """One question and its answer; train=False: a row without a supervised token."""
    turns = [Message(role="system", content=(TextPart(text=system),))] if system else []
    turns.append(Message(role="user", content=(TextPart(text=question),)))
    turns.append(Message(role="assistant", content=(TextPart(text=answer),), train=train))
    return Row(id=f"test.jsonl:{number + 1}", messages=tuple(turns), answer=answer)


def picture_row(number: int, dataset: Path, *, size: tuple[int, int] = (56, 56), train: bool = True) -> Row:
    """A coloured shape, drawn below dataset, and the question for its colour."""
    colour = COLOURS[number % len(COLOURS)]
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).ellipse((8, 8, size[0] - 8, size[1] - 8), fill=colour)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    (dataset / IMAGES_NAME).mkdir(parents=True, exist_ok=True)
    (dataset / IMAGES_NAME / f"{digest}.png").write_bytes(buffer.getvalue())
    part = ImagePart(image=f"{IMAGES_NAME}/{digest}.png", sha256=digest, width=size[0], height=size[1])
    question = Message(role="user", content=(part, TextPart(text="Which colour is the shape?")))
    answer = f"<think>The shape is {colour}.</think><answer>{colour}</answer>"
    return Row(
        id=f"test.jsonl:{number + 1}",
        messages=(question, Message(role="assistant", content=(TextPart(text=answer),), train=train)),
        answer=colour,
    )


def sums_dataset(path: Path, count: int = 12, *, masked: Sequence[int] = ()) -> Path:
    """Text rows of different lengths; the rows named in masked have no supervised token."""
    rows = [
        text_row(n, f"What is {n} + {n % 3}?", f"{n} + {n % 3} = {n + n % 3}" + ", so" * (n % 4), train=n not in masked)
        for n in range(count)
    ]
    return write_dataset(path, rows)


def shapes_dataset(path: Path, count: int = 8, *, masked: Sequence[int] = (), text_every: int = 4) -> Path:
    """Pictures of different sizes, and every text_every-th row without one."""
    rows = []
    for n in range(count):
        if n % text_every == text_every - 1:
            rows.append(text_row(n, f"What is {n} + 1?", str(n + 1), train=n not in masked))
        else:
            rows.append(picture_row(n, path, size=(56 + 28 * (n % 3), 56), train=n not in masked))
    return write_dataset(path, rows)


def one_picture_dataset(path: Path, count: int, *, masked: Sequence[int] = ()) -> Path:
    """Text rows, but for the first: over several ranks, only one of them has a picture."""
    rows = [text_row(n, f"What is {n} + 1?", str(n + 1) + ", so" * n, train=n not in masked) for n in range(1, count)]
    return write_dataset(path, [picture_row(0, path), *rows])


def metrics_of(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl without what no two runs share, times and memory, and without what is None."""
    varying = {"time", "tokens_per_second", "samples_per_second", "peak_memory_gib", "data_wait_share"}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name not in varying and value is not None} for line in lines
    ]
