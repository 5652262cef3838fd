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
from torch.distributed.tensor import DTensor

from vlm_dft import objectives
from vlm_dft.batches import MicroBatch, Plan, Steps, open_corpus
from vlm_dft.config import ObjectiveConfig, TrainConfig
from vlm_dft.data.collate import collate
from vlm_dft.data.encoding import Encoder, Sample
from vlm_dft.model import LoadedModel, adapt, load
from vlm_dft.objectives import TokenStatistics
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


def micro_batches_of(
    config: TrainConfig,
    loaded: LoadedModel,
    rank: int = 0,
    num_ranks: int = 1,
    ref_logp: dict[str, Tensor] | None = None,
) -> list[MicroBatch]:
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
        even=config.fsdp,
    )
    steps.ref_logp = ref_logp
    return next(steps.read())


def gradient_of(config: TrainConfig, *, ranks: Ranks | None = None) -> dict[str, Tensor]:
    """Gradients of the first step, by parameter."""
    ranks = ranks or Ranks()
    loaded = loaded_for(config)
    optimization = Optimization(loaded, config, ranks, 1)
    loaded.model.train()
    optimization.gradients(micro_batches_of(config, loaded, ranks.rank, ranks.count))
    return {name: p.grad for name, p in loaded.model.named_parameters() if p.grad is not None}


def definition_of(
    config: TrainConfig, loaded: LoadedModel | None = None, base: LoadedModel | None = None, step: int = 0
) -> dict[str, Tensor]:
    """The same by full logits of the stock model, one sample at a time, divided by the step's supervised tokens.

    base: the reference model, for objectives that compare with one. step: which, counted from 0.
    """
    loaded = loaded or loaded_for(config)
    model = loaded.model.train()
    model.zero_grad(set_to_none=True)
    corpus = open_corpus(config.dataset, Encoder(loaded.processor, config.pixels), config, Path(config.model))
    samples = [corpus.sample(index) for index in Plan(corpus.kept, config.batch_size, seed=config.seed).batch(step)]
    total = sum(sample.supervised_tokens for sample in samples)
    objective = objectives.from_config(config.objective)
    for sample in samples:
        if not sample.supervised_tokens:
            continue
        logits_NV, labels_N = _supervised_logits(model, sample, loaded.pad_token_id)
        reference_NV = None
        if base is not None:
            with torch.no_grad():
                reference_NV = _supervised_logits(base.model, sample, loaded.pad_token_id)[0].log_softmax(-1)
        statistics = _statistics(logits_NV.detach(), labels_N, reference_NV)
        logp_NV = logits_NV.log_softmax(-1)
        loss = (objective.weights(statistics) * -logp_NV.gather(1, labels_N[:, None]).squeeze(1)).sum()
        if objective.kl_weight and reference_NV is not None:
            loss = loss + objective.kl_weight * (reference_NV.exp() * (reference_NV - logp_NV)).sum()
        (loss / total).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return gradients


def _supervised_logits(model: torch.nn.Module, sample: Sample, pad_token_id: int) -> tuple[Tensor, Tensor]:
    inputs = collate([sample], pad_token_id)
    labels_T = inputs.pop("labels")[0, 1:]
    keep = labels_T != -100
    return model(**inputs, use_cache=False).logits[0, :-1][keep].double(), labels_T[keep]


def _statistics(logits_NV: Tensor, labels_N: Tensor, reference_NV: Tensor | None) -> TokenStatistics:
    """Everything that any objective asks for, of one sample, by definition."""
    logp_NV = logits_NV.log_softmax(-1)
    top_NK = logp_NV.exp().topk(objectives.TOP_K, dim=1).values
    top_NK = top_NK / top_NK.sum(dim=1, keepdim=True)
    target_N1 = labels_N[:, None]
    return TokenStatistics(
        logp_N=logp_NV.gather(1, target_N1).squeeze(1),
        entropy_N=-(logp_NV.exp() * logp_NV).sum(dim=1),
        top_entropy_N=-(top_NK * top_NK.log()).sum(dim=1),
        sum_p2_N=logp_NV.exp().square().sum(dim=1),
        ref_logp_N=reference_NV.gather(1, target_N1).squeeze(1) if reference_NV is not None else None,
        segments_N=torch.zeros_like(labels_N),
    )


def relative(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    difference = torch.cat([(found[name] - expected[name]).flatten().double() for name in expected])
    return (difference.norm() / torch.cat([g.flatten().double() for g in expected.values()]).norm()).item()


def save_sharded_gradients(out: str, *configs: str) -> None:
    """What each of two processes runs, its layers cut over both."""
    ranks = Ranks()
    found = []
    for text in configs:
        config = TrainConfig.model_validate_json(text).model_copy(update={"fsdp": True})
        gradients = gradient_of(config, ranks=ranks)
        assert any(isinstance(gradient, DTensor) for gradient in gradients.values())
        found.append({n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in gradients.items()})
    if ranks.is_first:
        torch.save(found, out)
    ranks.leave()
