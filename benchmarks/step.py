"""One optimizer step on pictures and answers: ours beside TRL's SFTTrainer(loss_type="dft").

Both get the same weights and the same samples as ready tensors, in float32, without recomputing activations; TRL as one
padded batch, which is all it offers for pictures, ours as one pack with the exact head. The body is deep enough for its
8k vocabulary that the head takes the share of a 3B model's, and the vision tower too. Three of ours: everything
trained, vision frozen, and vision frozen with its features cached; each beside TRL training the same parameters, and
beside TRL training everything. The gate: our gradient is that of one sample at a time through the stock model.
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
import numpy as np
import torch
from torch import Tensor
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from benchmarks.datasets import conversation, words, write_dataset, write_picture
from vlm_dft.batches import Corpus, MicroBatch, Plan, Steps, open_corpus
from vlm_dft.config import CacheConfig, FreezeConfig, ObjectiveConfig, TrainConfig
from vlm_dft.data.collate import collate
from vlm_dft.data.encoding import IGNORED, Encoder
from vlm_dft.model import LoadedModel, base_of, freeze, load
from vlm_dft.optimization import Optimization
from vlm_dft.pictures import Pictures
from vlm_dft.ranks import Ranks
from vlm_dft.tiny import build_tiny_vlm

ROUNDS, BATCH = 3, 8
VISUAL_TOKENS = (64, 0.8)
"""Median and spread (of the logarithm) of a picture's tokens: two thirds of the ``packing`` benchmark's, as spread."""
ANSWER_WORDS = (24, 0.6)
"""The same of an answer's words, of more than two tokens each."""
SEED = 59
"""Padded batches of eight are 58 % full on average (0.06 from one set of four to the next), and so are this seed's."""
DIMS: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_layers": 21,
    "num_heads": 4,
    "num_kv_heads": 2,
    "vocab_size": 8192,
    "vision_hidden_size": 256,
    "vision_intermediate_size": 688,
    "vision_layers": 7,
    "vision_heads": 4,
}
FROZEN = FreezeConfig()
TRAINED = FreezeConfig(vision_tower=False, merger=False)


def measure() -> dict[str, Any]:
    """The benchmark's line; ratio is that of everything trained."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        return _measure(Path(directory))


def _measure(directory: Path) -> dict[str, Any]:
    model, dataset = _write(directory)
    ours = {
        "all_trained": _Ours(model, dataset, freeze=TRAINED),
        "vision_frozen": _Ours(model, dataset, freeze=FROZEN),
        "features_cached": _Ours(
            model, dataset, freeze=FROZEN, vision_cache=CacheConfig(directory=directory / "cache")
        ),
    }
    theirs = {
        "trl_all_trained": _Trl(model, directory, ours["all_trained"], TRAINED),
        "trl_vision_frozen": _Trl(model, directory, ours["all_trained"], FROZEN),
    }
    gate = _gate(model, ours["all_trained"], theirs["trl_all_trained"])
    seconds = {name: [] for name in (*ours, *theirs)}
    for number in range(1, ROUNDS + 1):  # step 0 was the gate's
        for name, variant in (ours | theirs).items():
            seconds[name].append(_seconds(lambda: variant.step(number)))  # noqa: B023  called at once

    def ratio(variant: str, peer: str) -> float:
        return statistics.median(b / a for a, b in zip(seconds[variant], seconds[peer], strict=True))

    return {
        "ratio": ratio("all_trained", "trl_all_trained"),
        "vision_frozen_ratio": ratio("vision_frozen", "trl_all_trained"),
        "features_cached_ratio": ratio("features_cached", "trl_all_trained"),
        "vision_frozen_ratio_to_trl_frozen": ratio("vision_frozen", "trl_vision_frozen"),
        "features_cached_ratio_to_trl_frozen": ratio("features_cached", "trl_vision_frozen"),
        **gate,
        "seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "fill_of_trl_batches": ours["all_trained"].fill,
        "rounds": ROUNDS,
    }


class _Ours:
    """Our trainer's step on one pack."""

    def __init__(self, model: Path, dataset: Path, **settings: Any) -> None:
        self.config = TrainConfig(
            model=str(model),
            dataset=dataset,
            objective=ObjectiveConfig(name="dft"),
            batch_size=BATCH,
            packing=True,
            head_tolerance=0.0,
            gradient_checkpointing=False,
            precision="fp32",
            **settings,
        )
        self.loaded = load(model, precision="fp32", device="cpu", master_weights=True)
        freeze(base_of(self.loaded.model), self.config.freeze)
        ranks = Ranks()
        pictures = Pictures(self.loaded, self.config, ranks)
        encoder = Encoder(self.loaded.processor, self.config.pixels)
        self.corpus: Corpus = pictures.of(open_corpus(dataset, encoder, self.config, model))
        self.plan = Plan(self.corpus.kept, BATCH, seed=None)
        self.optimization = Optimization(self.loaded, self.config, ranks, self.plan.total_steps)
        pictures.prepare((self.corpus, self.plan))
        steps = Steps(
            self.corpus,
            self.plan,
            micro_batch_size=1,
            pad_token_id=self.loaded.pad_token_id,
            pack_length=self.config.pack_length,
        )
        self._prepared = list(steps.read())

    @property
    def fill(self) -> float:
        """Of the batches that TRL gets: tokens over slots."""
        sizes = self.corpus.sizes
        batches = [[sizes[index].tokens for index in self.plan.batch(step)] for step in range(self.plan.total_steps)]
        return sum(map(sum, batches)) / sum(BATCH * max(lengths) for lengths in batches)

    def micro_batches(self, number: int) -> list[MicroBatch]:
        return self._prepared[number]

    def step(self, number: int) -> None:
        self.optimization.step(number, self._prepared[number])


class _Trl:
    """SFTTrainer's own training_step and optimizer, on one padded batch."""

    def __init__(self, model: Path, directory: Path, ours: _Ours, frozen: FreezeConfig) -> None:
        self._loaded = load(model, precision="fp32", device="cpu", master_weights=True)
        freeze(base_of(self._loaded.model), frozen)
        from datasets import Dataset

        columns = {"images": [[]], "messages": [[{"role": "user", "content": ""}]]}  # only its columns are looked at
        self._trainer = SFTTrainer(
            self._loaded.model,
            SFTConfig(
                output_dir=str(directory / "trl"),
                loss_type="dft",
                activation_checkpointing=False,
                per_device_train_batch_size=BATCH,
                learning_rate=ours.config.learning_rate,
                max_length=None,
                use_cpu=True,
                bf16=False,
                report_to=[],
            ),
            train_dataset=Dataset.from_dict(columns),
            processing_class=self._loaded.processor,
        )
        self._optimizer: Any = self._trainer.create_optimizer()
        self._trainer.current_gradient_accumulation_steps = 1  # as its training loop sets it
        samples = [[ours.corpus.sample(index) for index in ours.plan.batch(n)] for n in range(ours.plan.total_steps)]
        self._prepared = [collate(batch, self._loaded.pad_token_id) for batch in samples]

    def gradients(self, number: int) -> dict[str, Tensor]:
        self._loaded.model.train()
        self._trainer.training_step(self._loaded.model, dict(self._prepared[number]))
        return _gradients(self._loaded)

    def step(self, number: int) -> None:
        self.gradients(number)
        self._trainer.accelerator.clip_grad_norm_(self._loaded.model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()


def _gate(model: Path, ours: _Ours, theirs: _Trl) -> dict[str, float]:
    """Relative distance of both gradients to one sample at a time; ours is within 1e-5."""
    expected = _one_at_a_time(load(model, precision="fp32", device="cpu"), ours)
    ours.loaded.model.train()
    ours.optimization.gradients(ours.micro_batches(0))
    error = _distance(_gradients(ours.loaded), expected)
    assert error <= 1e-5, f"our gradient is {error} away from one sample at a time"
    return {"gradient_error": error, "trl_gradient_error": _distance(theirs.gradients(0), expected)}


def _one_at_a_time(loaded: LoadedModel, ours: _Ours) -> dict[str, Tensor]:
    """The definition: the stock model's logits of each sample alone, divided by the step's supervised tokens."""
    model = loaded.model.train()
    samples = [ours.corpus.sample(index) for index in ours.plan.batch(0)]
    total = sum(sample.supervised_tokens for sample in samples)
    for sample in samples:
        inputs = collate([sample], loaded.pad_token_id)
        labels_T = inputs.pop("labels")[0, 1:]
        keep = labels_T != IGNORED
        logits_NV = model(**inputs, use_cache=False).logits[0, :-1][keep].double()
        logp_N = logits_NV.log_softmax(-1).gather(1, labels_T[keep][:, None]).squeeze(1)
        ((logp_N.detach().exp() * -logp_N).sum() / total).backward()
    return _gradients(loaded)


def _gradients(loaded: LoadedModel) -> dict[str, Tensor]:
    """Taken out of the model."""
    found = {name: p.grad for name, p in loaded.model.named_parameters() if p.grad is not None}
    loaded.model.zero_grad()
    return found


def _distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    squares = [(found[name] - gradient).square().sum().item() for name, gradient in expected.items()]
    return (sum(squares) / sum(gradient.square().sum().item() for gradient in expected.values())) ** 0.5


def _seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def drawn(seed: int) -> list[tuple[int, int]]:
    """Sides of pictures and words of answers."""
    generator = np.random.default_rng(seed)
    count = BATCH * (ROUNDS + 1)
    tokens, answers = (
        np.exp(generator.normal(np.log(m), spread, count)) for m, spread in (VISUAL_TOKENS, ANSWER_WORDS)
    )
    return [(28 * round(t**0.5), int(a) + 1) for t, a in zip(tokens.clip(9, 441), answers, strict=True)]


def _write(directory: Path) -> tuple[Path, Path]:
    """Model and dataset; sizes of pictures and lengths of answers are spread as those of real ones are."""
    vocabulary = words(6000)
    model = build_tiny_vlm(directory / "model", texts=[" ".join(vocabulary)] * 2, **DIMS)
    dataset = directory / "dataset"
    generator = np.random.default_rng(0)
    rows = []
    for number, (side, answer_words) in enumerate(drawn(SEED)):
        question, answer = (" ".join(generator.choice(vocabulary, count)) for count in (14, answer_words))
        rows.append(conversation(number, write_picture(dataset, (side, side), number), question, answer))
    return model, write_dataset(dataset, rows)
