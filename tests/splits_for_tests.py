"""A step of a model that has moved away from its base, cut in any way: ``Problem``, ``split_gradient``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from gradients_for_tests import config_of, definition_of, loaded_for

import vlm_dft.torchvision_shim  # noqa: F401

# isort: split
import torch
import torch.distributed as dist
from torch import Tensor

from vlm_dft import objectives
from vlm_dft.batches import Corpus, MicroBatch, Plan, Steps, open_corpus
from vlm_dft.config import ObjectiveConfig, TrainConfig
from vlm_dft.data.encoding import Encoder
from vlm_dft.model import LoadedModel, base_of, load
from vlm_dft.optimization import Optimization
from vlm_dft.ranks import LONGEST_WAIT, Ranks
from vlm_dft.reference import Reference

ROWS = 7
OPTIONS = {
    "dft": {"weight_floor": 0.002, "weight_cap": 0.5},
    "power": {"alpha": 0.5},
    "threshold": {"probability": 0.0023},  # near the middle of what these models give
    "asft": {"kl_weight": 0.5},
}
"""Those that make a difference for the tests' models."""


class OneOfMany(Ranks):
    """A rank of a step whose other ranks come later: it knows the tokens of all."""

    step_tokens = 0

    def sum_number(self, number: int) -> int:
        return self.step_tokens


@dataclass
class Problem:
    """A model that has moved away from its base, and a step of short, long, masked, text and picture rows."""

    model: Path
    dataset: Path
    loaded: LoadedModel
    base: LoadedModel
    corpus: Corpus
    expected: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    optimizations: dict[tuple[str, bool], tuple[Optimization, OneOfMany]] = field(default_factory=dict)
    ref_logp: dict[str, Tensor] = field(default_factory=dict)

    def config(self, objective: str, *, packing: bool) -> TrainConfig:
        chosen = ObjectiveConfig.model_validate({"name": objective} | OPTIONS.get(objective, {}))
        config = config_of(self.model, self.dataset, "nll", batch_size=ROWS, packing=packing, head_tolerance=0.0)
        return config.model_copy(update={"objective": chosen})

    def definition(self, objective: str) -> dict[str, Tensor]:
        if objective not in self.expected:
            base_of(self.loaded.model).set_attn_implementation("sdpa")
            config = self.config(objective, packing=False)
            self.expected[objective] = definition_of(config, self.loaded, self.base)
        return self.expected[objective]

    def steps_of(self, rows: list[int]) -> list[MicroBatch]:
        """One micro-batch per row."""
        plan = Plan(tuple(self.corpus.kept[row] for row in rows), len(rows), seed=None)
        pad = self.loaded.pad_token_id
        return next(Steps(self.corpus, plan, micro_batch_size=1, pad_token_id=pad).read())

    def optimization(self, objective: str, *, packing: bool) -> tuple[Optimization, OneOfMany]:
        if (objective, packing) not in self.optimizations:
            ranks = OneOfMany()
            made = Optimization(self.loaded, self.config(objective, packing=packing), ranks, 1)
            self.optimizations[objective, packing] = made, ranks
        return self.optimizations[objective, packing]


def problem_of(model: Path, dataset: Path) -> Problem:
    """The model with all its weights moved."""
    config = config_of(model, dataset, "nll")
    loaded = loaded_for(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    corpus = open_corpus(dataset, Encoder(loaded.processor, config.pixels), config, model)
    return Problem(model, dataset, loaded, load(model, precision="fp32", device="cpu"), corpus)


def split_gradient(
    problem: Problem, objective: str, *, micro_batch_size: int, pack_length: int | None, num_ranks: int, order: int
) -> dict[str, Tensor]:
    optimization, ranks = problem.optimization(objective, packing=pack_length is not None)
    model = base_of(problem.loaded.model)
    model.zero_grad(set_to_none=True)
    model.train()
    shares = shares_of(
        problem,
        optimization,
        micro_batch_size=micro_batch_size,
        pack_length=pack_length,
        num_ranks=num_ranks,
        order=order,
    )
    ranks.step_tokens = sum(micro_batch.num_tokens for share in shares for micro_batch in share)
    assert sum(len(micro_batch.row_ids) for share in shares for micro_batch in share) == ROWS
    for share in shares:
        optimization.gradients(share)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def shares_of(
    problem: Problem,
    optimization: Optimization,
    *,
    micro_batch_size: int,
    pack_length: int | None = None,
    num_ranks: int = 1,
    order: int = 0,
) -> list[list[MicroBatch]]:
    """Each rank's micro-batches of the step."""
    shares = []
    for rank in range(num_ranks):
        steps = Steps(
            problem.corpus,
            Plan(problem.corpus.kept, ROWS, seed=order),
            micro_batch_size=micro_batch_size,
            pad_token_id=problem.loaded.pad_token_id,
            pack_length=pack_length,
            rank=rank,
            num_ranks=num_ranks,
        )
        if optimization.objective.needs_ref_logp:
            steps.ref_logp = problem.ref_logp or _reference_logp(problem, steps)
        shares.append(next(steps.read()))
    return shares


def numbers_of(
    problem: Problem, objective: str, ranks: Ranks, *, micro_batch_size: int, pack_length: int | None
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The step's gradients, and its statistics as of held-out rows, over real processes."""
    optimization = Optimization(problem.loaded, problem.config(objective, packing=pack_length is not None), ranks, 1)
    layout = {"micro_batch_size": micro_batch_size, "pack_length": pack_length, "num_ranks": ranks.count}
    share = shares_of(problem, optimization, **layout)[ranks.rank]
    if problem.loaded.is_vision and ranks.count > 1:
        have_pictures = ranks.gather(any("pixel_values" in micro_batch.inputs for micro_batch in share))
        assert sorted(have_pictures) == [False, True]
    model = base_of(problem.loaded.model)
    model.zero_grad(set_to_none=True)
    model.train()
    optimization.gradients(share)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return gradients, optimization.counts(optimization.measure(share)).sums


def save_numbers_of_two_ranks(out: str, *problems: str) -> None:
    """What each of two processes runs: every objective, every second one in packs."""
    ranks = Ranks()
    assert ranks.count == 2
    assert dist.group.WORLD is not None
    assert dist.group.WORLD._get_backend(ranks.device).options._timeout == LONGEST_WAIT
    found = {}
    for model, dataset in zip(problems[::2], problems[1::2], strict=True):
        problem = problem_of(Path(model), Path(dataset))
        for number, name in enumerate(objectives.names()):
            layout = {"micro_batch_size": 1, "pack_length": 200} if number % 2 else {"micro_batch_size": 2}
            found[model, name] = numbers_of(problem, name, ranks, **({"pack_length": None} | layout))
    if ranks.is_first:
        torch.save(found, out)
    ranks.leave()


def _reference_logp(problem: Problem, steps: Steps) -> dict[str, Tensor]:
    reference = Reference(problem.loaded, problem.config("psft", packing=steps.pack_length is not None))
    alone = Steps(
        problem.corpus,
        Plan(problem.corpus.kept, ROWS, seed=None),
        micro_batch_size=1,
        pad_token_id=problem.loaded.pad_token_id,
        pack_length=steps.pack_length,
    )
    for micro_batch in next(alone.read()):
        problem.ref_logp |= reference.target_logp(micro_batch)
    return problem.ref_logp
