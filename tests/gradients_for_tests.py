"""Gradients of one step: as the trainer makes them, and as the definition has them.

Shapes: N supervised tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import vlm_dft.torchvision_shim  # noqa: F401

# isort: split
import torch
from torch import Tensor

from vlm_dft.batches import MicroBatch, Plan, Steps, open_corpus
from vlm_dft.config import ObjectiveConfig, TrainConfig
from vlm_dft.data.collate import collate
from vlm_dft.data.encoding import Encoder
from vlm_dft.model import LoadedModel, adapt, load
from vlm_dft.optimization import Optimization
from vlm_dft.ranks import Ranks

BATCH = 6


def config_of(model: Path, dataset: Path, objective: str, **settings) -> TrainConfig:
    defaults = {
        "batch_size": BATCH,
        "gradient_checkpointing": False,
        "freeze": {"vision_tower": False, "merger": False} if settings.get("adapter") is None else {},
    }
    return TrainConfig(
        model=str(model), dataset=dataset, objective=ObjectiveConfig(name=objective), **(defaults | settings)
    )


def loaded_for(config: TrainConfig, loaded: LoadedModel | None = None) -> LoadedModel:
    """The model as a training has it."""
    loaded = loaded or load(config.model, precision="fp32", device="cpu")
    return dataclasses.replace(loaded, model=adapt(loaded.model, config.adapter, config.freeze, config.seed))


def micro_batches_of(config: TrainConfig, loaded: LoadedModel, rank: int = 0, num_ranks: int = 1) -> list[MicroBatch]:
    """Those of the first step."""
    corpus = open_corpus(config.dataset, Encoder(loaded.processor, config.pixels), config, Path(config.model))
    plan = Plan(corpus.kept, config.batch_size, seed=config.seed)
    steps = Steps(
        corpus,
        plan,
        micro_batch_size=config.micro_batch_size,
        pad_token_id=loaded.pad_token_id,
        pack_length=config.pack_length,
        rank=rank,
        num_ranks=num_ranks,
    )
    return next(steps.read())


def gradient_of(config: TrainConfig, *, ranks: Ranks | None = None) -> dict[str, Tensor]:
    """Gradients of the first step, by parameter."""
    ranks = ranks or Ranks()
    loaded = loaded_for(config)
    optimization = Optimization(loaded, config, ranks, 1)
    loaded.model.train()
    optimization.gradients(micro_batches_of(config, loaded, ranks.rank, ranks.count))
    return {name: p.grad for name, p in loaded.model.named_parameters() if p.grad is not None}


def definition_of(config: TrainConfig) -> dict[str, Tensor]:
    """The same by full logits of the stock model, one sample at a time, divided by the step's supervised tokens."""
    loaded = loaded_for(config)
    model = loaded.model.train()
    corpus = open_corpus(config.dataset, Encoder(loaded.processor, config.pixels), config, Path(config.model))
    samples = [corpus.sample(index) for index in Plan(corpus.kept, BATCH, seed=config.seed).batch(0)]
    total = sum(sample.supervised_tokens for sample in samples)
    for sample in samples:
        inputs = collate([sample], loaded.pad_token_id)
        labels_T = inputs.pop("labels")[0, 1:]
        keep = labels_T != -100
        logits_NV = model(**inputs, use_cache=False).logits[0, :-1][keep].double()
        logp_N = logits_NV.log_softmax(-1).gather(1, labels_T[keep][:, None]).squeeze(1)
        weight_N = logp_N.detach().exp() if config.objective.name == "dft" else torch.ones_like(logp_N)
        ((weight_N * -logp_N).sum() / total).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def relative(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    difference = torch.cat([(found[name] - expected[name]).flatten().double() for name in expected])
    return (difference.norm() / torch.cat([g.flatten().double() for g in expected.values()]).norm()).item()


def save_gradients_of_two_ranks(out: str, *problems: str) -> None:
    """What each of two processes runs."""
    ranks = Ranks()
    assert ranks.count == 2
    gradients = {
        f"{model} {objective} {packing}": gradient_of(
            config_of(Path(model), Path(dataset), objective, packing=packing), ranks=ranks
        )
        for model, dataset in zip(problems[::2], problems[1::2], strict=True)
        for objective in ("nll", "dft")
        for packing in (False, True)
    }
    if ranks.is_first:
        torch.save(gradients, out)
    ranks.leave()
