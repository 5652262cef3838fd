"""Answers to benchmark items: our continuous batches beside transformers' `generate`, one item at a time.

Both get the same random Qwen2.5-VL and the same items: a picture, a question of varying length. One token out of a
hundred ends a turn, so that answers are as unequal as real ones, which is what batches suffer from. Ours is timed with
what an evaluation does, from the encoded picture to the text; so is the other, with the stock processor and no logits
processor. The gate: in float64, where no two tokens are tied by rounding, every answer is the same, token for token;
in float32 the line says how many are.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import vlm_dft.torchvision_shim  # noqa: F401

# isort: split
import torch
from PIL import Image
from transformers import GenerationConfig

from benchmarks.datasets import words, write_picture
from vlm_dft.config import GenerationSettings, PixelConfig
from vlm_dft.data.encoding import Encoder
from vlm_dft.data.pixels import resized_size
from vlm_dft.evaluation.answering import Ask, prompt_length
from vlm_dft.evaluation.generation import Generator, end_token_ids
from vlm_dft.evaluation.items import Item, Picture
from vlm_dft.model import LoadedModel, base_of, load
from vlm_dft.tiny import build_tiny_vlm

ITEMS, BATCH, ROUNDS, MAX_NEW_TOKENS = 40, 20, 3, 256
GATE_ITEMS = 6
END_EVERY = 100
"""One token in so many ends the turn: answers have that many tokens on average."""
PIXELS = PixelConfig(max_pixels=64 * 28 * 28)
DIMS: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_layers": 4,
    "num_heads": 8,
    "num_kv_heads": 2,
    "vocab_size": 4096,
    "initializer_range": 0.1,
}


def measure() -> dict[str, Any]:
    """The benchmark's line; ratio: items per second of ours over one at a time."""
    with tempfile.TemporaryDirectory() as directory:
        vocabulary = words(2000)
        model = build_tiny_vlm(Path(directory, "model"), texts=[" ".join(vocabulary)], **DIMS)
        loaded = load(str(model), precision="fp32", device="cpu")
        items = _items(Path(directory), vocabulary)
        ends = _end_turns_often(loaded)
        ours, single = _ours(loaded), _one_at_a_time(loaded, ends)
        rounds = [(_timed(ours, items), _timed(single, items)) for _ in range(ROUNDS)]
        loaded.model.double()
        gate = ours(items[:GATE_ITEMS]) == single(items[:GATE_ITEMS])
    assert gate, "the answers differ in float64: one side is wrong"
    (_, texts), (_, expected) = rounds[0]
    seconds = [statistics.median(each[side][0] for each in rounds) for side in (0, 1)]
    ratio = statistics.median(theirs[0] / mine[0] for mine, theirs in rounds)
    lengths = [len(text) for text in expected]
    return {
        "ratio": ratio,
        "items_per_second": ITEMS / seconds[0],
        "one_at_a_time_items_per_second": ITEMS / seconds[1],
        "same_in_float64": gate,
        "same_in_float32": sum(a == b for a, b in zip(texts, expected, strict=True)),
        "items": ITEMS,
        "batch_size": BATCH,
        "answer_characters": {"min": min(lengths), "median": statistics.median(lengths), "max": max(lengths)},
        "threads": torch.get_num_threads(),
        "rounds": ROUNDS,
    }


def _items(directory: Path, vocabulary: Sequence[str]) -> list[Item]:
    items = []
    for number in range(ITEMS):
        size = ((168, 168), (224, 140), (140, 252))[number % 3]
        part = write_picture(directory, size, seed=number)
        question = " ".join(vocabulary[number : number + 8 + 5 * (number % 5)])
        picture = Picture(f"item {number}", path=directory / part.image)
        items.append(Item(str(number), str(number), question, picture, "A"))
    return items


def _end_turns_often(loaded: LoadedModel) -> list[int]:
    """Declare end tokens as a model's generation_config may; both sides honour them."""
    size = base_of(loaded.model).config.get_text_config().vocab_size
    base_of(loaded.model).generation_config = GenerationConfig(eos_token_id=list(range(0, size, END_EVERY)))
    return end_token_ids(loaded)


def _ours(loaded: LoadedModel) -> Callable[[Sequence[Item]], list[str]]:
    settings = GenerationSettings(max_new_tokens=MAX_NEW_TOKENS, batch_size=BATCH)
    generator = Generator(loaded, settings, PIXELS)

    def answer(items: Sequence[Item]) -> list[str]:
        asks = sorted((Ask(item, 0) for item in items), key=prompt_length(PIXELS), reverse=True)
        found = {asks[index].item.id: each.text for index, each in generator.stream([ask.item for ask in asks])}
        return [found[item.id] for item in items]

    return answer


def _one_at_a_time(loaded: LoadedModel, ends: Sequence[int]) -> Callable[[Sequence[Item]], list[str]]:
    """The stock processor and `generate`, as a script would call them; pictures resized to the same pixels."""
    model: Any = base_of(loaded.model)
    processor: Any = loaded.processor
    config = GenerationConfig(
        max_new_tokens=MAX_NEW_TOKENS, do_sample=False, eos_token_id=list(ends), pad_token_id=loaded.pad_token_id
    )
    Encoder(loaded.processor, PIXELS)  # the processor's own resizing is switched off as ours switches it off

    def answer(items: Sequence[Item]) -> list[str]:
        found = []
        for item in items:
            assert item.picture is not None
            image = item.picture.decoded().convert("RGB")
            image = image.resize(resized_size(*image.size, PIXELS), Image.Resampling.BICUBIC)
            turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": item.prompt}]}
            text = processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
            inputs = processor(text=[text], images=[image], return_tensors="pt")
            with torch.inference_mode():
                output = model.generate(**inputs, generation_config=config)
            tokens = output[0, inputs["input_ids"].shape[1] :].tolist()
            end = next((index for index, token in enumerate(tokens) if token in ends), len(tokens))
            found.append(loaded.tokenizer.decode(tokens[:end], skip_special_tokens=True))
        return found

    return answer


def _timed(answer: Callable[[Sequence[Item]], list[str]], items: Sequence[Item]) -> tuple[float, list[str]]:
    began = time.process_time()
    texts = answer(items)
    return time.process_time() - began, texts
