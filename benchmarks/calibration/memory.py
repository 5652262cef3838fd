"""``python -m benchmarks.calibration.memory``: the estimate's memory beside measured peaks, in five configurations.

A small Qwen2.5-VL with real images is trained for two steps on the CPU, each configuration in a process of its own.
Measured is the largest resident set since the model began to be loaded, less what the process held before. The C
library is told to give freed memory back at once, which a GPU's allocator does not do either: fragmentation is not in.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

FIGURES = Path(__file__).with_name("memory.json")
CONFIGURATIONS: Final[dict[str, dict[str, Any]]] = {
    "full, vision trained, no checkpointing": {
        "freeze": {"vision_tower": False, "merger": False},
        "gradient_checkpointing": False,
    },
    "full, vision frozen, no checkpointing": {"gradient_checkpointing": False},
    "full, vision frozen, checkpointing": {"gradient_checkpointing": True},
    "full, vision frozen, packing": {"gradient_checkpointing": False, "packing": True, "pack_length_tokens": 1600},
    "lora, no checkpointing": {"adapter": {"type": "lora"}, "gradient_checkpointing": False},
}
DIMS: Final = {
    "hidden_size": 384,
    "intermediate_size": 1152,
    "num_layers": 6,
    "num_heads": 6,
    "num_kv_heads": 2,
    "vocab_size": 4096,
    "vision_hidden_size": 256,
    "vision_intermediate_size": 512,
    "vision_layers": 4,
    "vision_heads": 4,
}
_MALLOC: Final = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
STEPS: Final = 2


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibration.memory", description=__doc__)
    parser.add_argument("--child", type=Path, nargs=2, metavar=("DIRECTORY", "CONFIGURATION"), help=argparse.SUPPRESS)
    parser.add_argument("names", nargs="*", help="configurations to measure again; none: all")
    arguments = parser.parse_args()
    if arguments.child is not None:
        print(json.dumps(measure_here(arguments.child[0], str(arguments.child[1]))))
        return 0
    known = {row["configuration"]: row for row in json.loads(FIGURES.read_text())} if arguments.names else {}
    with tempfile.TemporaryDirectory() as directory:
        prepare(Path(directory))
        for name in arguments.names or CONFIGURATIONS:
            known[name] = measure(Path(directory), name)
    rows = [known[name] for name in CONFIGURATIONS]
    FIGURES.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    for row in rows:
        print(f"{row['configuration']}: {row['measured_mib']} measured, {row['estimated_mib']} MiB estimated")
    return 0


def prepare(directory: Path, **dims: Any) -> None:
    """The model and the data that all configurations share."""
    from benchmarks.datasets import conversation, words, write_dataset, write_picture
    from vlm_dft.tiny import build_tiny_vlm

    build_tiny_vlm(directory / "model", **(DIMS | dims))
    home = directory / "dataset"
    rows = []
    for number in range(8):
        image = write_picture(home, (448, 448) if number % 2 else (364, 448), number)
        rows.append(conversation(number, image, "What is this?", " ".join(words(100 + 10 * number, number))))
    write_dataset(home, rows)


def measure(directory: Path, name: str) -> dict[str, Any]:
    """One configuration in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.calibration.memory", "--child", str(directory), name]
    done = subprocess.run(command, env=os.environ | _MALLOC, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure_here(directory: Path, name: str) -> dict[str, Any]:
    """The peak of this process, and the estimate from the same config."""
    import vlm_dft.torchvision_shim  # noqa: F401

    # isort: split
    import torch

    from vlm_dft import trainer
    from vlm_dft.batches import Plan, Steps, open_corpus
    from vlm_dft.config import TrainConfig
    from vlm_dft.data.canonical import CanonicalDataset
    from vlm_dft.data.encoding import Encoder
    from vlm_dft.estimate_memory import MemoryReckoning
    from vlm_dft.estimate_rows import RowsReckoning, counted_now
    from vlm_dft.model_shape import read_shape
    from vlm_dft.optimization import Optimization
    from vlm_dft.ranks import Ranks

    torch.set_num_threads(1)
    config = TrainConfig.model_validate(
        {
            "model": str(directory / "model"),
            "dataset": directory / "dataset",
            "batch_size": 4,
            "micro_batch_size": 1 if CONFIGURATIONS[name].get("packing") else 2,
            "precision": "fp32",
            **CONFIGURATIONS[name],
        }
    )
    ranks = Ranks()
    before = _resident_bytes("VmRSS")
    loaded = trainer._load(config, None, ranks)
    encoder = Encoder(loaded.processor, config.pixels)
    corpus = open_corpus(config.dataset, encoder, config, directory / "model")
    steps = Steps(
        corpus,
        Plan(corpus.kept, config.batch_size, seed=0, max_steps=STEPS),
        micro_batch_size=config.micro_batch_size,
        pad_token_id=loaded.pad_token_id,
        pack_length=config.pack_length,
    )
    optimization = Optimization(loaded, config, ranks, STEPS)
    _forget_peak()
    for number, micro_batches in enumerate(steps.read()):
        optimization.step(number, micro_batches)
    peak = _resident_bytes("VmHWM") - before
    rendered = [encoder.template.render(row) for row in CanonicalDataset.open(config.dataset)]
    counted = counted_now(
        CanonicalDataset.open(config.dataset),
        [row.text_tokens for row in rendered],
        [row.supervised_tokens for row in rendered],
        (),
    )
    reckoning = RowsReckoning(counted, config)
    memory = MemoryReckoning(read_shape(directory / "model"), config, on_gpu=False)
    estimate = memory.estimate(*reckoning.largest_micro_batch())
    trained = sum(parameter.numel() for parameter in loaded.model.parameters() if parameter.requires_grad)
    assert trained == estimate.trainable_parameters, (trained, estimate.trainable_parameters)
    return {
        "configuration": name,
        "measured_mib": round(peak / 2**20),
        "estimated_mib": round(estimate.total_gib * 1024),
        "error": round(estimate.total_gib * 2**30 / peak - 1, 3),
        "parts_mib": {
            part: round(getattr(estimate, f"{part}_gib") * 1024)
            for part in ("weights", "gradients", "optimizer", "activations", "vision", "head")
        },
        "tokens": estimate.largest_micro_batch_tokens,
        "visual_tokens": estimate.largest_micro_batch_visual_tokens,
    }


def _resident_bytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _forget_peak() -> None:
    """Give freed memory back, and let VmHWM begin again at what is resident now."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    raise SystemExit(main())
