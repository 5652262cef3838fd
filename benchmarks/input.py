"""Images in, device-ready tensors out: our loader in its first and in later epochs, beside TRL's collator.

Both start from the same JPEG files and conversations, and are timed up to what goes to the device: TRL's normalised
pixels, our 8-bit patches, which the device normalises. The gate shows that this is no dodge: once normalised they are
what the PIL processor makes of the file, and the model's hidden states are bit for bit those of uncached pixels.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import vlm_dft.torchvision_shim  # noqa: F401

# isort: split
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from benchmarks.datasets import conversation, write_dataset, write_picture
from vlm_dft.batches import Corpus, MicroBatch, Plan, Steps, open_corpus
from vlm_dft.config import CacheConfig, TrainConfig
from vlm_dft.data.canonical import Row
from vlm_dft.data.encoding import Encoder
from vlm_dft.model import LoadedModel, base_of, load
from vlm_dft.pictures import Pictures
from vlm_dft.ranks import Ranks
from vlm_dft.tiny import build_tiny_vlm
from vlm_dft.vision_inputs import VisionInputs

SIZES = ((448, 448), (1024, 768))
SAMPLES, BATCH, ROUNDS = 16, 4, 7
LATER_EPOCHS = 20
"""Per round, for a time that the clock resolves."""
QUESTION = "How many shapes are there in the picture, and which of their colours appears most often?"
ANSWER = "I count the shapes of each colour, row by row, and compare the counts with each other. " * 12


def measure() -> dict[str, Any]:
    """The benchmark's line; ratio is the smaller one of the two sizes."""
    torch.set_num_threads(1)
    by_size = {}
    with tempfile.TemporaryDirectory() as directory:
        loaded = load(build_tiny_vlm(Path(directory, "model")), precision="fp32", device="cpu")
        for size in SIZES:
            by_size["x".join(map(str, size))] = _measure(Path(directory), loaded, size)
    return {
        "ratio": min(found["later_epochs_ratio"] for found in by_size.values()),
        "first_epoch_ratio": min(found["first_epoch_ratio"] for found in by_size.values()),
        "sizes": by_size,
        "samples": SAMPLES,
        "rounds": ROUNDS,
    }


def _measure(directory: Path, loaded: LoadedModel, size: tuple[int, int]) -> dict[str, float]:
    dataset = directory / "x".join(map(str, size))
    pictures = [write_picture(dataset, size, number) for number in range(SAMPLES)]
    rows = [conversation(number, picture, QUESTION, ANSWER) for number, picture in enumerate(pictures)]
    write_dataset(dataset, rows)
    caches = iter(range(1000))

    def steps() -> Steps:
        """As the trainer has them at its first step, with an empty cache."""
        config = CacheConfig(directory=dataset / f"cache-{next(caches)}")
        return _steps(loaded, dataset, TrainConfig(model=loaded.source, dataset=dataset, patch_cache=config))

    error = _gate(loaded, dataset, rows, steps())
    collator = DataCollatorForVisionLanguageModeling(loaded.processor)  # pyright: ignore[reportArgumentType]

    def trl() -> None:
        for start in range(0, SAMPLES, BATCH):
            collator([_trl_example(dataset, row) for row in rows[start : start + BATCH]])

    def epoch(prepared: Steps) -> None:
        for step in range(prepared.plan.steps_per_epoch):
            assert isinstance(prepared[step], list)

    trl()  # warm
    first_ratios, later_ratios, milliseconds = [], [], []
    for _ in range(ROUNDS):
        prepared = steps()
        theirs = _seconds(trl)
        first = _seconds(lambda: epoch(prepared))  # noqa: B023  called at once
        later = _seconds(lambda: [epoch(prepared) for _ in range(LATER_EPOCHS)]) / LATER_EPOCHS  # noqa: B023
        first_ratios.append(theirs / first)
        later_ratios.append(theirs / later)
        milliseconds.append([1000 * seconds / SAMPLES for seconds in (theirs, first, later)])
    medians = [statistics.median(column) for column in zip(*milliseconds, strict=True)]
    return {
        "later_epochs_ratio": statistics.median(later_ratios),
        "first_epoch_ratio": statistics.median(first_ratios),
        **dict(zip(("trl_ms", "first_epoch_ms", "later_epochs_ms"), medians, strict=True)),
        "error_to_pil_processor": error,
    }


def _gate(loaded: LoadedModel, dataset: Path, rows: list[Row], prepared: Steps) -> float:
    """Largest difference to the PIL processor's pixels, having compared hidden states."""
    body, vision_inputs = base_of(loaded.model).base_model, VisionInputs(loaded.processor)
    uncached = _steps(loaded, dataset, TrainConfig(model=loaded.source, dataset=dataset))
    pictures: Any = [Image.open(dataset / row.images[0].image) for row in rows[:BATCH]]
    by_pil = Qwen2VLImageProcessorPil()(images=pictures, return_tensors="pt")["pixel_values"]
    error = 0.0
    for _ in range(2):  # written, then read
        ours, plain = _first(prepared), _first(uncached)
        assert ours.inputs["pixel_values"].dtype == torch.uint8
        with torch.no_grad():
            found, expected = (body(**vision_inputs(part.inputs)).last_hidden_state for part in (ours, plain))
        assert torch.equal(found, expected), "the model sees something else"
        error = max(error, (vision_inputs(ours.inputs)["pixel_values"] - by_pil).abs().max().item())
    assert error <= 1e-6, f"{error} away from the PIL processor"
    return error


def _first(steps: Steps) -> MicroBatch:
    micro_batches = steps[0]
    assert isinstance(micro_batches, list), micro_batches
    return micro_batches[0]


def _seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def _steps(loaded: LoadedModel, dataset: Path, config: TrainConfig) -> Steps:
    pictures = Pictures(loaded, config, Ranks())
    encoder = Encoder(loaded.processor, config.pixels)
    corpus: Corpus = pictures.of(open_corpus(dataset, encoder, config, Path(loaded.source)))
    plan = Plan(corpus.kept, BATCH, seed=None)
    pictures.prepare((corpus, plan))
    return Steps(corpus, plan, micro_batch_size=BATCH, pad_token_id=loaded.pad_token_id)


def _trl_example(dataset: Path, row: Row) -> dict[str, Any]:
    picture = Image.open(dataset / row.images[0].image)  # decoded when the processor asks
    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    return {"images": [picture], "messages": turns}
