"""Make a task's base model, look at it with the preflight, fine-tune it with every objective, and score what came out.

Every arm of a task has the same data, order, steps and learning rate. Knows nothing about which objective should win.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.calibration.tasks import Base, Pair, Task
from vlm_dft.config import GenerationSettings, ObjectiveConfig, PixelConfig, PreflightConfig, TrainConfig
from vlm_dft.data.canonical import MANIFEST_NAME, ROWS_NAME, Manifest, Message, Row, TextPart
from vlm_dft.evaluation.generation import Generator
from vlm_dft.evaluation.items import Item
from vlm_dft.model import load
from vlm_dft.preflight import preflight
from vlm_dft.preflight_report import PreflightReport
from vlm_dft.run_dir import RunDir
from vlm_dft.tiny import BUILT_IN_TEXTS, build_tiny_text
from vlm_dft.trainer import train

OBJECTIVES: Final = {
    "nll": ObjectiveConfig(name="nll"),
    "dft": ObjectiveConfig(name="dft"),
    "power 0.5": ObjectiveConfig(name="power", alpha=0.5),
    "dft floor 0.1": ObjectiveConfig(name="dft", weight_floor=0.1),
}
_DIMS: Final = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 4,
    "vocab_size": 512,
    "initializer_range": 0.12,
}
_SHARED: Final[dict[str, Any]] = {
    "batch_size": 32,
    "micro_batch_size": 32,
    "gradient_checkpointing": False,
    "precision": "fp32",
    "probe_rows": 0,
    "checkpoint_every_steps": 100_000,
    "log_every_steps": 1000,
}
LEARNING_RATE: Final = 1e-3


def write_dataset(path: Path, pairs: Sequence[Pair]) -> Path:
    """Pairs as a canonical dataset."""
    path.mkdir(parents=True)
    rows = [
        Row(
            id=f"{path.name}.jsonl:{number}",
            messages=(
                Message(role="user", content=(TextPart(text=question),)),
                Message(role="assistant", content=(TextPart(text=answer),)),
            ),
        )
        for number, (question, answer) in enumerate(pairs, 1)
    ]
    lines = "".join(row.model_dump_json() + "\n" for row in rows)
    (path / ROWS_NAME).write_text(lines)
    fingerprint = hashlib.sha256(lines.encode()).hexdigest()
    manifest = Manifest(rows=len(rows), format="openai", filename=path.name, image_root=".", fingerprint=fingerprint)
    (path / MANIFEST_NAME).write_text(manifest.model_dump_json())
    return path


def make_base(base: Base, directory: Path, seed: int) -> Path:
    """A random model trained on the base's corpus, below directory; made once."""
    home = directory / base.name
    if home.is_dir():
        return home / "run" / "export"
    texts = [*BUILT_IN_TEXTS, *(f"{question}\n{answer}" for question, answer in base.corpus)]
    random = build_tiny_text(home / "random", "qwen2", texts=texts, seed=seed, **_DIMS)
    config = TrainConfig(
        model=str(random),
        dataset=write_dataset(home / "corpus", base.corpus),
        max_steps=base.steps,
        learning_rate=3e-3,
        seed=seed,
        **_SHARED,
    )
    return _trained(config, home / "run")


def look(base: Path, dataset: Path, directory: Path) -> PreflightReport:
    """What the preflight says about a base and its demonstrations."""
    directory.mkdir()
    return preflight(PreflightConfig(model=str(base), dataset=dataset, precision="fp32"), RunDir(directory))


def fine_tune(
    base: Path, dataset: Path, objective: ObjectiveConfig, directory: Path, *, epochs: int, seed: int
) -> Path:
    """The exported model of one arm."""
    config = TrainConfig(
        model=str(base),
        dataset=dataset,
        objective=objective,
        n_epochs=epochs,
        learning_rate=LEARNING_RATE,
        seed=seed,
        **_SHARED,
    )
    return _trained(config, directory)


def _trained(config: TrainConfig, directory: Path) -> Path:
    directory.mkdir()
    run = RunDir(directory)
    train(config, run)
    return run.export_path


def accuracy(model: Path, task: Task) -> int:
    """Questions answered right; greedily."""
    items = [
        Item(id=str(number), group=str(number), prompt=question, picture=None, answer=task.score(answer))
        for number, (question, answer) in enumerate(task.questions)
    ]
    settings = GenerationSettings(max_new_tokens=64, batch_size=50)
    answers = Generator(load(model, precision="fp32", device="cpu"), settings, PixelConfig()).answers(items)
    return sum(
        bool(item.answer) and task.score(answer.text) == item.answer
        for item, answer in zip(items, answers, strict=True)
    )


def quiet() -> None:
    """Trainings log a line per thousand steps otherwise."""
    logging.getLogger("vlm_dft").setLevel(logging.ERROR)
