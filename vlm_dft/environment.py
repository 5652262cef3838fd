"""What a training ran on and with: environment.json of its run directory, for whoever wants the same numbers again."""

from __future__ import annotations

import os
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import distributions
from typing import Final

from vlm_dft.config import TrainConfig
from vlm_dft.errors import ModelError
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


@contextmanager
def recorded_environment(run: RunDir, train: TrainConfig) -> Iterator[None]:
    """Within: the training; written once that has ended well, for only then there is something to do again.

    The weights are hashed beside the training: reading all of them takes up to a minute, at every attempt. Raises
    ModelError when the model is not there, DiskFullError.
    """
    model = locate(train.model, train.revision)
    hashes: list[str] = []
    # A daemon: a training that fails or is stopped does not wait for it.
    thread = threading.Thread(target=lambda: hashes.append(model_sha256(model)), name="hash", daemon=True)
    thread.start()
    yield
    thread.join()
    if not hashes:
        raise ModelError(f"{model} cannot be hashed, the log says why: it has changed since the training began")
    write_json(run.environment_path, _environment(hashes[0]))


def _environment(model_sha256: str) -> Environment:
    import torch

    return Environment(
        python=platform.python_version(),
        platform=platform.platform(),
        machine=platform.machine(),
        num_threads=torch.get_num_threads(),
        devices=tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())),
        cuda=torch.version.cuda,
        variables={name: os.environ[name] for name in VARIABLES if name in os.environ},
        packages=installed_packages(),
        model_sha256=model_sha256,
    )


def installed_packages() -> dict[str, str]:
    """Name -> version, by name."""
    found: dict[str, str] = {}
    for each in distributions():
        if name := each.metadata["Name"]:
            found.setdefault(name.lower(), each.version)  # one further down sys.path is hidden by the first
    return dict(sorted(found.items()))
