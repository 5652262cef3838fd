"""One long and one short answer about pictures: does the gradient depend on how the two are cut into micro-batches?

Ours beside TRL's SFTTrainer(loss_type="dft"), on the same weights and the same prepared samples, in float32. TRL's own
loop runs one optimizer step, once as a batch of two and once as two of one, and its gradients are read before the
update, unclipped. The truth is one sample at a time through the stock model, divided by all supervised tokens.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import vlm_dft.torchvision_shim  # noqa: F401

# isort: split
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from benchmarks.datasets import conversation, words, write_dataset, write_picture
from vlm_dft.batches import Corpus, Plan, Steps, open_corpus
from vlm_dft.config import FreezeConfig, ObjectiveConfig, TrainConfig
from vlm_dft.data.collate import collate
from vlm_dft.data.encoding import IGNORED, Encoder, Sample
from vlm_dft.model import LoadedModel, base_of, freeze, load
from vlm_dft.objective_config import Objective
from vlm_dft.optimization import Optimization
from vlm_dft.ranks import Ranks
from vlm_dft.tiny import build_tiny_vlm

OBJECTIVES: tuple[Objective, ...] = ("dft", "nll")
LONG, SHORT = 320, 3
"""Words of the two answers."""
SETTINGS: dict[str, dict[str, Any]] = {
    "one_micro_batch": {"micro_batch_size": 2},
    "two_micro_batches": {"micro_batch_size": 1},
    "one_pack": {"packing": True},
}


def measure() -> dict[str, Any]:
    """The benchmark's line; ratio is TRL's distance between two splits over ours, for dft."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        model, dataset = _write(Path(directory))
        for objective in OBJECTIVES:
            truth = _definition(model, dataset, objective)
            ours = {name: _ours(model, dataset, objective, **settings) for name, settings in SETTINGS.items()}
            theirs = [_trl(model, dataset, objective, Path(directory), size) for size in (2, 1)]
            error = max(_distance(gradients, truth) for gradients in ours.values())
            assert error <= 1e-5, f"our {objective} gradient depends on the split: {error}"
            found[objective] = {
                "difference": max(_difference(gradients, ours["one_micro_batch"]) for gradients in ours.values()),
                "trl_difference": _difference(*theirs),
                "error": error,
                "trl_errors": [_distance(gradients, truth) for gradients in theirs],
            }
    return {"ratio": found["dft"]["trl_difference"] / found["dft"]["difference"], **found}


def _loaded(model: Path) -> LoadedModel:
    loaded = load(model, precision="fp32", device="cpu")
    freeze(base_of(loaded.model), FreezeConfig(vision_tower=False, merger=False))
    return loaded


def _corpus(loaded: LoadedModel, config: TrainConfig) -> Corpus:
    return open_corpus(config.dataset, Encoder(loaded.processor, config.pixels), config, Path(config.model))


def _config(model: Path, dataset: Path, objective: Objective, **settings: Any) -> TrainConfig:
    return TrainConfig(
        model=str(model),
        dataset=dataset,
        objective=ObjectiveConfig(name=objective),
        batch_size=2,
        gradient_checkpointing=False,
        **settings,
    )


def _ours(model: Path, dataset: Path, objective: Objective, **settings: Any) -> dict[str, Tensor]:
    """Our trainer's gradient of the step, with its settings as they are by default."""
    loaded, config = _loaded(model), _config(model, dataset, objective, **settings)
    steps = Steps(
        corpus := _corpus(loaded, config),
        Plan(corpus.kept, 2, seed=None),
        micro_batch_size=config.micro_batch_size,
        pad_token_id=loaded.pad_token_id,
        pack_length=config.pack_length,
    )
    optimization = Optimization(loaded, config, Ranks(), 1)
    loaded.model.train()
    optimization.gradients(next(steps.read()))
    return _gradients(loaded)


def _definition(model: Path, dataset: Path, objective: Objective) -> dict[str, Tensor]:
    loaded, config = _loaded(model), _config(model, dataset, objective)
    samples = _samples(loaded, config)
    total = sum(sample.supervised_tokens for sample in samples)
    for sample in samples:
        inputs = collate([sample], loaded.pad_token_id)
        labels_T = inputs.pop("labels")[0, 1:]
        keep = labels_T != IGNORED
        logits_NV = loaded.model.train()(**inputs, use_cache=False).logits[0, :-1][keep].double()
        logp_N = logits_NV.log_softmax(-1).gather(1, labels_T[keep][:, None]).squeeze(1)
        weight_N = logp_N.detach().exp() if objective == "dft" else torch.ones_like(logp_N)
        ((weight_N * -logp_N).sum() / total).backward()
    return _gradients(loaded)


class _Catch(TrainerCallback):
    """Reads the gradients that the loop has accumulated."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self.gradients: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.gradients = {name: gradient.clone() for name, gradient in _gradients(self._loaded).items()}


def _trl(model: Path, dataset: Path, objective: Objective, directory: Path, batch: int) -> dict[str, Tensor]:
    """TRL's accumulated gradient, both samples in micro-batches of batch."""
    loaded = _loaded(model)
    samples = _samples(loaded, _config(model, dataset, objective))
    catch = _Catch(loaded)
    columns = {"images": [[], []], "messages": [[{"role": "user", "content": "a"}]] * 2, "place": [0, 1]}
    trainer = SFTTrainer(
        loaded.model,
        SFTConfig(
            output_dir=str(directory / "trl"),
            loss_type=objective,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=2 // batch,
            max_steps=1,
            max_grad_norm=0.0,
            max_length=None,
            gradient_checkpointing=False,
            activation_checkpointing=False,
            use_cpu=True,
            bf16=False,
            report_to=[],
            remove_unused_columns=False,
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict(columns),
        data_collator=lambda rows: collate([samples[row["place"]] for row in rows], loaded.pad_token_id),
        processing_class=loaded.processor,
        callbacks=[catch],
    )
    trainer.remove_callback(PrinterCallback)  # standard output is for one line
    trainer.train()
    return catch.gradients


def _samples(loaded: LoadedModel, config: TrainConfig) -> Sequence[Sample]:
    corpus = _corpus(loaded, config)
    return [corpus.sample(index) for index in corpus.kept]


def _gradients(loaded: LoadedModel) -> dict[str, Tensor]:
    return {name: p.grad for name, p in loaded.model.named_parameters() if p.grad is not None}


def _distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Relative to what is expected, over all parameters."""
    return _norm({name: found[name] - gradient for name, gradient in expected.items()}) / _norm(expected)


def _difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Relative to the longer of two gradients."""
    return _norm({name: one[name] - gradient for name, gradient in other.items()}) / max(_norm(one), _norm(other))


def _norm(gradients: dict[str, Tensor]) -> float:
    return sum(gradient.double().square().sum().item() for gradient in gradients.values()) ** 0.5


def _write(directory: Path) -> tuple[Path, Path]:
    vocabulary = words(600)
    model = build_tiny_vlm(directory / "model", texts=[" ".join(vocabulary)] * 2, vocab_size=2048)
    dataset = directory / "dataset"
    rows = [
        conversation(
            number,
            write_picture(dataset, (112, 84), number),
            "What does the picture show?",
            " ".join(vocabulary[:count]),
        )
        for number, count in enumerate((LONG, SHORT))
    ]
    return model, write_dataset(dataset, rows)
