"""What GPUs this machine has, and which processes are on them, through NVML. No GPU or no driver: empty lists.

Knows nothing about torch: a GPU is found without creating a CUDA context. NVML is opened and closed around each
call, because a handle does not survive the fork that a Celery pool is made by.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import pynvml
import structlog

from vlm_dft.errors import VlmDftError

log = structlog.get_logger(__name__)
_GIB = 2**30


class GpuLostError(VlmDftError):
    """A GPU that this worker was given does not answer: see nvidia-smi, and restart the worker when it does."""

    code = "gpu_lost"


@dataclass(frozen=True)
class Gpu:
    """One GPU as NVML sees it; None where the device does not tell."""

    index: int
    """NVML's number, in PCI order."""
    uuid: str
    """What CUDA_VISIBLE_DEVICES takes, whatever order CUDA counts in."""
    name: str
    memory_total_gib: float
    memory_used_gib: float
    utilisation_percent: int | None
    temperature_celsius: int | None

    def document(self) -> dict[str, Any]:
        """As stored in the workers table."""
        return asdict(self)


@contextmanager
def _nvml() -> Iterator[bool]:
    """Yield whether NVML works here: neither a machine without a GPU nor one without a driver is an error."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield False
        return
    try:
        yield True
    finally:
        pynvml.nvmlShutdown()


def gpus() -> list[Gpu]:
    """Every GPU of the machine that answers, in NVML's order."""
    with _nvml() as works:
        return [gpu for gpu in map(_gpu, range(pynvml.nvmlDeviceGetCount())) if gpu is not None] if works else []


def _gpu(index: int) -> Gpu | None:
    try:
        device = pynvml.nvmlDeviceGetHandleByIndex(index)
        memory = pynvml.nvmlDeviceGetMemoryInfo(device)
    except pynvml.NVMLError as error:  # it has fallen off the bus, or needs a reset
        log.error("a GPU does not answer", index=index, error=str(error))
        return None
    return Gpu(
        index=index,
        uuid=pynvml.nvmlDeviceGetUUID(device),
        name=pynvml.nvmlDeviceGetName(device),
        memory_total_gib=round(int(memory.total) / _GIB, 2),
        memory_used_gib=round(int(memory.used) / _GIB, 2),
        utilisation_percent=_optional(lambda: pynvml.nvmlDeviceGetUtilizationRates(device).gpu),
        temperature_celsius=_optional(
            lambda: pynvml.nvmlDeviceGetTemperature(device, pynvml.NVML_TEMPERATURE_GPU),
        ),
    )


def _optional(ask: Callable[[], Any]) -> int | None:
    """The answer, or None from a device that has no such sensor (MIG slices, some laptops)."""
    try:
        return int(ask())
    except pynvml.NVMLError:
        return None


def visible_gpus(environment: dict[str, str] | None = None) -> list[Gpu]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves to this process; all of them when it is not set.

    Raises GpuLostError when it names one that does not answer: training on the CPU instead would be no help.
    """
    chosen = (os.environ if environment is None else environment).get("CUDA_VISIBLE_DEVICES")
    found = gpus()
    # Without NVML we know nothing, and its list does not show the slices of a MIG device.
    if chosen is None or not found or "MIG-" in chosen:
        return found if chosen is None else []
    visible = []
    for name in filter(None, map(str.strip, chosen.split(","))):
        # CUDA takes the beginning of a UUID too.
        matching = [gpu for gpu in found if name == str(gpu.index) or gpu.uuid.startswith(name)]
        if not matching:
            raise GpuLostError(f"CUDA_VISIBLE_DEVICES names {name}, which does not answer: see nvidia-smi")
        visible.append(matching[0])
    return visible


def processes_on(devices: list[Gpu]) -> set[int]:
    """Process ids that have a CUDA context on one of the devices, as far as this process namespace shows them."""
    with _nvml() as works:
        if not works:
            return set()
        handles = [pynvml.nvmlDeviceGetHandleByUUID(gpu.uuid) for gpu in devices]
        return {process.pid for handle in handles for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)}
