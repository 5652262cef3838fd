"""A step on pictures of different sizes: our packs beside padded rows, and beside transformers' packing by a mask.

All three are our trainer on the same samples with the same exact head, so that the layout alone differs: eight rows
padded to the longest; one pack whose attention runs sample by sample; the same pack under the block-causal mask that
transformers makes of its positions. Samples are counted, not slots. The gate: each layout's gradient is that of one
sample at a time. Lengths are drawn from a seed; the fill of long packs is planned from the same distribution.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import vlm_dft.torchvision_shim  # noqa: F401

# isort: split
import numpy as np
import torch
from torch import Tensor

from benchmarks.datasets import conversation, words, write_dataset, write_picture
from vlm_dft.batches import Corpus, MicroBatch, Plan, Steps, open_corpus
from vlm_dft.config import ObjectiveConfig, TrainConfig
from vlm_dft.data.encoding import Encoder
from vlm_dft.model import base_of, freeze, load
from vlm_dft.optimization import Optimization
from vlm_dft.packing import Size, packed
from vlm_dft.ranks import Ranks
from vlm_dft.tiny import build_tiny_vlm

ROUNDS, BATCH = 3, 8
DIMS: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_layers": 6,
    "num_heads": 4,
    "num_kv_heads": 2,
    "vocab_size": 4096,
    "vision_hidden_size": 128,
    "vision_intermediate_size": 344,
    "vision_layers": 4,
    "vision_heads": 4,
}
VISUAL_TOKENS = (100, 0.8)
"""Median and spread (of the logarithm) of a picture's tokens; mathematical benchmarks have medians from 64 to 320."""
ANSWER_WORDS = (100, 0.6)
"""The same of an answer's words. With them visual : prompt : answer tokens are about as 256 : 80 : 360 of WeThink."""
TOKENS_PER_WORD = 1.5
SEED = 163
"""Padded batches of eight are 57 % full on average (0.06 from one set of four to the next); this seed's are too."""
PACK_LENGTH, PLANNED = 8192, 1024

_DRAWN = (VISUAL_TOKENS, ANSWER_WORDS)


def measure() -> dict[str, Any]:
    """The benchmark's line; ratio is that to padded rows."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        model, dataset = _write(Path(directory))
        layouts = {
            "packed": _Layout(model, dataset, packing=True),
            "padded": _Layout(model, dataset, micro_batch_size=BATCH),
            "block_mask": _Layout(model, dataset, packing=True, stock_attention=True),
        }
        alone = _Layout(model, dataset).gradients(0)
        errors = {name: _distance(layout.gradients(0), alone) for name, layout in layouts.items()}
    assert max(errors.values()) <= 1e-5, f"a layout's gradient is not that of one sample at a time: {errors}"
    seconds: dict[str, list[float]] = {name: [] for name in layouts}
    for number in range(1, ROUNDS + 1):
        for name, layout in layouts.items():
            began = time.process_time()
            layout.optimization.step(number, layout.steps[number])
            seconds[name].append(time.process_time() - began)

    def ratio(peer: str) -> float:
        return statistics.median(b / a for a, b in zip(seconds["packed"], seconds[peer], strict=True))

    return {
        "ratio": ratio("padded"),
        "block_mask_ratio": ratio("block_mask"),
        "fill": layouts["packed"].fill,
        "padded_fill": layouts["padded"].fill,
        "fill_of_long_packs": _planned_fill(),
        "gradient_errors": errors,
        "answers_per_second": {name: BATCH / statistics.median(times) for name, times in seconds.items()},
        "tokens_per_step": layouts["packed"].tokens / (ROUNDS + 1),
        "rounds": ROUNDS,
    }


class _Layout:
    """Our trainer, its steps encoded already."""

    def __init__(self, model: Path, dataset: Path, *, stock_attention: bool = False, **settings: Any) -> None:
        config = TrainConfig(
            model=str(model),
            dataset=dataset,
            objective=ObjectiveConfig(name="dft"),
            batch_size=BATCH,
            head_tolerance=0.0,
            gradient_checkpointing=False,
            precision="fp32",
            **settings,
        )
        self._loaded = load(model, precision="fp32", device="cpu", master_weights=True)
        freeze(base_of(self._loaded.model), config.freeze)
        corpus: Corpus = open_corpus(dataset, Encoder(self._loaded.processor, config.pixels), config, model)
        plan = Plan(corpus.kept, BATCH, seed=None)
        self.optimization = Optimization(self._loaded, config, Ranks(), plan.total_steps)
        if stock_attention:
            base_of(self._loaded.model).set_attn_implementation("sdpa")
        prepared = Steps(
            corpus,
            plan,
            micro_batch_size=config.micro_batch_size,
            pad_token_id=self._loaded.pad_token_id,
            pack_length=config.pack_length,
        )
        self.steps: list[list[MicroBatch]] = list(prepared.read())

    @property
    def tokens(self) -> int:
        return sum(micro_batch.input_tokens for step in self.steps for micro_batch in step)

    @property
    def fill(self) -> float:
        """Tokens over the positions that are computed."""
        return self.tokens / sum(micro_batch.padded_tokens for step in self.steps for micro_batch in step)

    def gradients(self, number: int) -> dict[str, Tensor]:
        """Of a step, taken out of the model."""
        self._loaded.model.train()
        self.optimization.gradients(self.steps[number])
        found = {name: p.grad for name, p in self._loaded.model.named_parameters() if p.grad is not None}
        self._loaded.model.zero_grad()
        return found


def _distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    squares = sum((found[name] - gradient).double().square().sum().item() for name, gradient in expected.items())
    return (squares / sum(gradient.double().square().sum().item() for gradient in expected.values())) ** 0.5


def _draw(generator: np.random.Generator) -> tuple[tuple[int, int], int]:
    """Width and height of a picture, words of an answer: spread as those of real data are."""
    tokens, answer_words = (generator.lognormal(np.log(median), spread) for median, spread in _DRAWN)
    side = 28 * round(min(max(tokens, 16), 1024) ** 0.5)
    return (side, side), int(answer_words) + 1


def _planned_fill() -> float:
    """Tokens over the length of the packs of one large step, planned as the trainer plans them."""
    generator = np.random.default_rng(1)
    sizes = []
    for _ in range(PLANNED):
        (width, height), answer_words = _draw(generator)
        visual = width * height // 28**2
        sizes.append(Size(visual + 50 + int(TOKENS_PER_WORD * answer_words), visual))
    packs = packed(sizes, PACK_LENGTH)
    return sum(size.tokens for size in sizes) / (PACK_LENGTH * len(packs))


def _write(directory: Path) -> tuple[Path, Path]:
    vocabulary = words(3000)
    model = build_tiny_vlm(directory / "model", texts=[" ".join(vocabulary)] * 2, **DIMS)
    generator = np.random.default_rng(SEED)
    dataset = directory / "dataset"
    rows = []
    for number in range(BATCH * (ROUNDS + 1)):
        size, answer_words = _draw(generator)
        question, answer = (" ".join(generator.choice(vocabulary, count)) for count in (14, answer_words))
        rows.append(conversation(number, write_picture(dataset, size, number), question, answer))
    return model, write_dataset(dataset, rows)
