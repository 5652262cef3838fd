"""Files as a user would upload them: a WeThink archive with its pictures."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = ("red", "green", "blue", "yellow")


def wethink_archive(path: Path, rows: int) -> Path:
    """A .tar.gz with data.jsonl and one 56 x 56 picture per row, in WeThink's seven fields."""
    lines = []
    with tarfile.open(path, "w:gz") as archive:
        for number in range(rows):
            colour = COLOURS[number % len(COLOURS)]
            image = Image.new("RGB", (56, 56), "white")
            ImageDraw.Draw(image).ellipse((6 + number % 7, 8, 46, 48), fill=colour)
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            _add(archive, f"images/{number}.png", buffer.getvalue())
            lines.append(
                {
                    "problem": f"<image>Picture {number}: which colour is the disc?",
                    "answer": colour,
                    "category": "colour",
                    "abilities": "recognition",
                    "refined_cot": f"The disc in picture {number} is {colour}.",
                    "image_path": f"images/{number}.png",
                    "reward": "rule-based",
                }
            )
        _add(archive, "data.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    return path


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))
