"""A small We-Math in the authors' form, a stand-in for VLMEvalKit, and evaluations whose answers are already there."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from vlm_dft.config import BenchmarkConfig, EvalConfig, PixelConfig
from vlm_dft.evaluation.items import Item
from vlm_dft.evaluation.vlmevalkit.answer_log import Answer, AnswerLog
from vlm_dft.evaluation.vlmevalkit.installation import Installation
from vlm_dft.evaluation.vlmevalkit.work import Model, Work, read_benchmark
from vlm_dft.run_dir import RunDir

FAKE = Path(__file__).with_name("fake_vlmevalkit")
GROUPS = (("1", 2), ("2", 2), ("7", 3))
"""ID and number of steps; with the problem itself 3 + 3 + 4 items."""
NUM_ITEMS = 10


def wemath_benchmark(directory: Path) -> Path:
    """Three groups; the right option is always B."""
    (directory / "images").mkdir(parents=True)
    rows = []
    for identity, steps in GROUPS:
        for part in [*map(str, range(1, steps + 1)), "multi"]:
            picture = f"images/{identity}-{part}.png"
            Image.new("RGB", (56, 56), "white").save(directory / picture)
            rows.append(
                {
                    "ID": identity,
                    "key": f"{steps}steps_{part}",
                    "question": f"How many in {identity}, {part}?",
                    "option": "A. 007; B. 1.50; C. NA; D. none",
                    "answer": "B",
                    "knowledge concept": "Axial Symmetry",
                    "image_path": picture,
                }
            )
    (directory / "testmini.json").write_text(json.dumps(rows))
    return directory


def fake_installation(directory: Path, **plan: list[str]) -> Installation:
    """A stand-in of its own. plan: what it does at each start, see its run.py; eval_ for eval."""
    root = shutil.copytree(FAKE, directory / "checkout", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "plan.json").write_text(json.dumps({name.rstrip("_"): words for name, words in plan.items()}))
    return Installation(Path(sys.executable), root, "fake", {})


def eval_config(benchmark: Path, limit: int | None = None, **settings: Any) -> EvalConfig:
    entry = BenchmarkConfig(name="wemath", kind="wemath", path=benchmark, limit=limit)
    pixels = PixelConfig(max_pixels=16 * 28 * 28)
    return EvalConfig(model="m", benchmarks=(entry,), backend="vlmevalkit", pixels=pixels, **settings)


def answered_work(
    config: EvalConfig,
    run: RunDir,
    installation: Installation,
    model: Path,
    answer: Callable[[Item], str],
) -> Work:
    """A prepared working directory in which every item has its answer, so that no model is loaded."""
    asked = [read_benchmark(config, position, entry) for position, entry in enumerate(config.benchmarks)]
    who = Model("tuned", str(model), model, "a" * 64)
    work = Work(config, run, installation, asked, who)
    work.prepare()
    facts = {"precision": "float32", "device": "cpu", "image_backend": "none"}
    (work.answers / "facts.json").write_text(json.dumps(facts) + "\n")
    for entry in asked:
        answers = [
            Answer(index=index, prompt=item.prompt, text=answer(item), finish_reason="stop", num_tokens=1)
            for index, item in entry.table.rows.items()
        ]
        AnswerLog.open(work.answers_path(entry)).append(answers)
    return work
