"""What a training ran on and with: environment.json of its run directory, for whoever wants the same numbers again."""

from __future__ import annotations

import os
import platform
from importlib.metadata import distributions
from typing import Final

from vlm_dft.config import TrainConfig
from vlm_dft.model_files import locate, model_sha256
from vlm_dft.results import Record
from vlm_dft.run_dir import RunDir, write_json

VARIABLES: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUBLAS_WORKSPACE_CONFIG", "PYTORCH_ALLOC_CONF")
"""Those that can change a sum's last bit."""


class Environment(Record):
    """environment.json."""

    python: str
    platform: str
    machine: str
    num_threads: int
    """Of one process: sums are split among so many."""
    devices: tuple[str, ...]
    """Names of the GPUs; empty on the CPU."""
    cuda: str | None
    variables: dict[str, str]
    packages: dict[str, str]
    """Every installed distribution and its version."""
    model_sha256: str
    """Of the weights that the training began with."""


def record_environment(run: RunDir, train: TrainConfig) -> None:
    """Write it. Raises ModelError when the model is not there, DiskFullError."""
    import torch

    write_json(
        run.environment_path,
        Environment(
            python=platform.python_version(),
            platform=platform.platform(),
            machine=platform.machine(),
            num_threads=torch.get_num_threads(),
            devices=tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())),
            cuda=torch.version.cuda,
            variables={name: os.environ[name] for name in VARIABLES if name in os.environ},
            packages=installed_packages(),
            model_sha256=model_sha256(locate(train.model, train.revision)),
        ),
    )


def installed_packages() -> dict[str, str]:
    """Name -> version, by name."""
    found: dict[str, str] = {}
    for each in distributions():
        if name := each.metadata["Name"]:
            found.setdefault(name.lower(), each.version)  # one further down sys.path is hidden by the first
    return dict(sorted(found.items()))
