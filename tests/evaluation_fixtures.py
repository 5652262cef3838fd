"""A benchmark of plain colours in MathVision's form, and a tiny model that has learned to answer it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import vlm_dft.torchvision_shim  # noqa: F401

# isort: split
import torch
from PIL import Image

from vlm_dft.config import PixelConfig
from vlm_dft.data.canonical import CanonicalDataset, ImagePart, Manifest, Message, Row, TextPart
from vlm_dft.data.collate import collate
from vlm_dft.data.encoding import Encoder
from vlm_dft.evaluation import mathvision
from vlm_dft.evaluation.items import Item
from vlm_dft.model import base_of, load, save_model
from vlm_dft.tiny import build_tiny_vlm

COLOURS = {"A": "red", "B": "blue", "C": "lime", "D": "white"}
PIXELS = PixelConfig(max_pixels=16 * 28 * 28)


def colour_benchmark(directory: Path, num_items: int = 8) -> Path:
    """Pictures of different sizes, each of one colour; a question about it; options by name."""
    (directory / "images").mkdir(parents=True)
    rows = []
    for index in range(num_items):
        letter = "ABCD"[index % 4]
        name = f"images/{index}.png"
        Image.new("RGB", (56 + 28 * (index % 3), 56), COLOURS[letter]).save(directory / name)
        question = "Which colour?" + " Look well." * (index % 3) + "\n<image1>"
        row = {"id": str(index), "question": question, "options": list(COLOURS.values()), "answer": letter}
        rows.append(row | {"level": 1 + index % 2, "subject": "counting", "image": name})
    (directory / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def learned_vlm(out: Path, benchmark: Path, steps: int = 60) -> Path:
    """A model that answers the benchmark's questions right, as "<answer>B</answer>": overfitted in seconds."""
    torch.manual_seed(0)
    loaded = load(build_tiny_vlm(out.with_name("base"), initializer_range=0.1))
    encoder = Encoder(loaded.processor, PIXELS)
    manifest = Manifest(rows=0, format="test", filename="test", image_root=".", fingerprint="")
    dataset = CanonicalDataset(benchmark, manifest)
    samples = [encoder.encode(_row(item, benchmark), dataset) for item in colour_items(benchmark)]
    batch = collate(samples, loaded.pad_token_id)
    optimizer = torch.optim.AdamW(loaded.model.parameters(), lr=5e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loaded.model(**batch).loss.backward()
        optimizer.step()
    out.mkdir(parents=True, exist_ok=True)
    save_model(base_of(loaded.model), loaded.processor, out)
    return out


def _row(item: Item, benchmark: Path) -> Row:
    assert item.picture is not None
    assert item.picture.path is not None
    width, height = item.picture.size()
    sha256 = hashlib.sha256(item.picture.encoded()).hexdigest()
    name = str(item.picture.path.relative_to(benchmark.resolve()))
    picture = ImagePart(image=name, sha256=sha256, width=width, height=height)
    question = Message(role="user", content=(picture, TextPart(text=item.prompt)))
    answer = Message(role="assistant", content=(TextPart(text=f"<answer>{item.answer}</answer>"),))
    return Row(id=item.id, messages=(question, answer))


def colour_items(directory: Path) -> tuple[Item, ...]:
    return mathvision.load(directory, "direct").items


def diverse_vlm(out: Path) -> Path:
    """A random model whose answers vary: large weights instead of the usual small ones."""
    return build_tiny_vlm(out, initializer_range=0.4)
