"""Seconds from kill -9 in the middle of a training to its first new step, beside starting Python and loading the model.

Both are wall time of fresh processes on this machine. What is between them is the price of a crash beyond loading: the
checkpoint is checked, optimizer and schedule are read, the data is found at its place, and one step is taken. How long
a supervisor takes to notice the death is not part of it.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.datasets import conversation, words, write_dataset, write_picture
from vlm_dft.config import RunConfig, TrainConfig
from vlm_dft.run_dir import RunDir
from vlm_dft.tiny import build_tiny_vlm

ROUNDS = 3
SAMPLES = 8
DIMS: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 768, "num_layers": 12, "vocab_size": 4096}
_LOAD = """
import gc
gc.disable()  # as the trainer imports it
import sys, time
from vlm_dft.model import load
load(sys.argv[1], precision="fp32", device="cpu")
print(time.time())
"""


def measure() -> dict[str, Any]:
    """The benchmark's line; ratio is resuming over loading alone."""
    with tempfile.TemporaryDirectory() as directory:
        model, config = _write(Path(directory))
        rounds = []
        for number in range(ROUNDS):
            run = RunDir(Path(directory, f"run-{number}"))
            run.create(RunConfig(run_id="benchmark", train=config))
            rounds.append((_resume_seconds(run), _load_seconds(model)))
    return {
        "ratio": statistics.median(resume / load for resume, load in rounds),
        "seconds_to_first_new_step": statistics.median(resume for resume, _ in rounds),
        "seconds_to_start_python_and_load_the_model": statistics.median(load for _, load in rounds),
        "rounds": ROUNDS,
    }


def _resume_seconds(run: RunDir) -> float:
    with _trainer(run) as first:
        while len(run.complete_checkpoints()) < 2:
            _wait(first)
        first.kill()
        killed = time.time()
    with _trainer(run) as second:
        while not (lines := [line for line in run.read_metrics() if line["time"] > killed]):
            _wait(second)
        second.kill()
    assert lines[0]["step"] > 1, "it began anew"
    return lines[0]["time"] - killed


@contextmanager
def _trainer(run: RunDir) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is gone afterwards."""
    with run.log_path.open("ab") as log:
        process = subprocess.Popen([sys.executable, "-m", "vlm_dft", str(run.path)], stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _wait(process: subprocess.Popen[bytes]) -> None:
    assert process.poll() is None, f"the trainer ended with {process.returncode}: see its log"
    time.sleep(0.02)


def _load_seconds(model: Path) -> float:
    began = time.time()
    loaded = subprocess.run([sys.executable, "-c", _LOAD, str(model)], check=True, capture_output=True, text=True)
    return float(loaded.stdout.split()[-1]) - began


def _write(directory: Path) -> tuple[Path, TrainConfig]:
    vocabulary = words(2000)
    model = build_tiny_vlm(directory / "model", texts=[" ".join(vocabulary)] * 2, **DIMS)
    dataset = directory / "dataset"
    rows = [
        conversation(number, write_picture(dataset, (112, 112), number), "How many?", " ".join(vocabulary[:20]))
        for number in range(SAMPLES)
    ]
    write_dataset(dataset, rows)
    settings: dict[str, Any] = {"batch_size": 2, "max_steps": 10_000, "checkpoint_every_steps": 1}
    return model, TrainConfig(model=str(model), dataset=dataset, gradient_checkpointing=False, **settings)
