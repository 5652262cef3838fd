"""The gradient of a step is that of its definition, however the step is cut: D1 and D2 of the peers' defects.

Shapes: N supervised tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
from datasets_for_tests import shapes_dataset, sums_dataset

import vlm_dft.torchvision_shim  # noqa: F401

# isort: split
import torch
from torch import Tensor

from vlm_dft.batches import Plan, Steps, open_corpus
from vlm_dft.config import FullConfig, LoraConfig, ObjectiveConfig, TrainConfig
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


def loaded_for(config: TrainConfig) -> LoadedModel:
    loaded = load(config.model, precision="fp32", device="cpu")
    return dataclasses.replace(loaded, model=adapt(loaded.model, config.adapter, config.freeze, config.seed))


def gradient_of(config: TrainConfig, *, ranks: Ranks | None = None) -> dict[str, Tensor]:
    """Gradients of the first step, by parameter."""
    ranks = ranks or Ranks()
    loaded = loaded_for(config)
    corpus = open_corpus(config.dataset, Encoder(loaded.processor, config.pixels), config, Path(config.model))
    plan = Plan(corpus.kept, config.batch_size, seed=config.seed)
    steps = Steps(
        corpus,
        plan,
        micro_batch_size=config.micro_batch_size,
        pad_token_id=loaded.pad_token_id,
        rank=ranks.rank,
        num_ranks=ranks.count,
    )
    optimization = Optimization(loaded, config, ranks, plan.total_steps)
    loaded.model.train()
    optimization.gradients(next(steps.read()))
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


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes_dataset(tmp_path_factory.mktemp("shapes") / "dataset", BATCH, masked=[1, 4])


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sums_dataset(tmp_path_factory.mktemp("sums") / "dataset", BATCH, masked=[2, 3])


@pytest.mark.parametrize("objective", ["nll", "dft"])
@pytest.mark.parametrize("family", ["tiny_vlm", "tiny_qwen2", "tiny_llama"])
def test_any_split_gives_the_gradient_of_the_definition(
    family: str, objective: str, shapes: Path, sums: Path, request: pytest.FixtureRequest
):
    model = request.getfixturevalue(family)
    dataset = shapes if family == "tiny_vlm" else sums
    expected = definition_of(config_of(model, dataset, objective))
    for micro_batch_size in (1, 2, 3, BATCH):
        config = config_of(model, dataset, objective, micro_batch_size=micro_batch_size)
        assert relative(gradient_of(config), expected) < 1e-5


def test_gradient_checkpointing_changes_no_gradient(tiny_vlm: Path, shapes: Path):
    expected = definition_of(config_of(tiny_vlm, shapes, "dft"))
    config = config_of(tiny_vlm, shapes, "dft", micro_batch_size=2, gradient_checkpointing=True)
    assert relative(gradient_of(config), expected) < 1e-5


def test_lora_gradients_are_split_invariant_too(tiny_vlm: Path, shapes: Path):
    adapter = LoraConfig(targets="all")
    expected = definition_of(config_of(tiny_vlm, shapes, "dft", adapter=adapter))
    assert all(".lora_" in name for name in expected)
    for micro_batch_size in (1, 4):
        config = config_of(tiny_vlm, shapes, "dft", adapter=adapter, micro_batch_size=micro_batch_size)
        assert relative(gradient_of(config), expected) < 1e-5


def test_a_step_of_masked_rows_alone_has_a_zero_gradient(tiny_vlm: Path, tmp_path: Path):
    dataset = shapes_dataset(tmp_path / "dataset", BATCH, masked=range(BATCH))
    gradients = gradient_of(config_of(tiny_vlm, dataset, "dft", micro_batch_size=2))
    assert all(gradient.abs().max() == 0 for gradient in gradients.values())


def test_a_frozen_language_model_meets_rows_without_pictures(tiny_vlm: Path, tmp_path: Path):
    dataset = shapes_dataset(tmp_path / "dataset", BATCH, text_every=2)
    freeze = {"vision_tower": True, "merger": False, "language_model": True}
    expected = gradient_of(config_of(tiny_vlm, dataset, "nll", freeze=freeze, micro_batch_size=BATCH))
    found = gradient_of(config_of(tiny_vlm, dataset, "nll", freeze=freeze, micro_batch_size=1))
    assert all(".merger." in name for name in expected)
    assert relative(found, expected) < 1e-5


RANK = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_trainer_gradients as t
from vlm_dft.ranks import Ranks
ranks = Ranks()
assert ranks.count == 2, ranks.count
gradients = {}
for model, dataset in zip(sys.argv[3::2], sys.argv[4::2], strict=True):
    for objective in ("nll", "dft"):
        config = t.config_of(Path(model), Path(dataset), objective)
        gradients[f"{model} {objective}"] = t.gradient_of(config, ranks=ranks)
if ranks.is_first:
    t.torch.save(gradients, sys.argv[2])
ranks.leave()
"""


def test_two_ranks_give_the_gradient_of_one_process(tiny_vlm: Path, tiny_llama: Path, tmp_path: Path):
    # 5 rows over 2 ranks: unequal numbers of micro-batches, pictures on one rank while the other has none.
    shapes = shapes_dataset(tmp_path / "shapes", 5, masked=[1], text_every=2)
    sums = sums_dataset(tmp_path / "sums", 5, masked=[2])
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    out = tmp_path / "gradients.pt"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    problems = [str(tiny_vlm), str(shapes), str(tiny_llama), str(sums)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*torchrun, str(Path(__file__).parent), str(out), *problems], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    by_ranks = torch.load(out, weights_only=True)
    for model, dataset in ((tiny_vlm, shapes), (tiny_llama, sums)):
        for objective in ("nll", "dft"):
            alone = gradient_of(config_of(model, dataset, objective, micro_batch_size=2))
            assert relative(by_ranks[f"{model} {objective}"], alone) < 1e-5


def test_full_fine_tuning_keeps_master_weights_in_float32_under_bf16(tiny_vlm: Path, shapes: Path):
    config = config_of(tiny_vlm, shapes, "dft", adapter=FullConfig(), freeze={"vision_tower": True})
    loaded = load(config.model, precision="bf16", device="cpu", master_weights=True)
    adapt(loaded.model, config.adapter, config.freeze, config.seed)
    Optimization(loaded, config, Ranks(), 1)
    types = {name: p.dtype for name, p in loaded.model.named_parameters()}
    assert types["model.language_model.layers.0.mlp.up_proj.weight"] == torch.float32
    assert types["model.visual.blocks.0.attn.qkv.weight"] == torch.bfloat16
