"""Tensors on disk, one file each, named by what they were made from and memory-mapped when read.

    ROOT/<hash of settings>/settings.json           what they were made with
    ROOT/<hash of settings>/<first two letters>/<name>   raw numbers, nothing else

Processes share a root without agreeing on anything: a file appears by rename, two writers of one name write the same
bytes, and a reader knows how long a file must be. One that a power loss has cut short is therefore made again; nothing
is flushed to disk file by file.
Knows nothing about what the tensors mean.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm_dft.config import CacheConfig
from vlm_dft.data import cache_room
from vlm_dft.errors import ConfigError, DiskFullError
from vlm_dft.run_dir import disk_errors, write_json


class TensorFiles:
    """The tensors of one type that one set of settings makes, by name."""

    def __init__(self, config: CacheConfig, settings: Mapping[str, Any], dtype: torch.dtype) -> None:
        """settings: all that a tensor's numbers depend on beside its name; JSON. Raises ConfigError, DiskFullError."""
        described = {**settings, "dtype": str(dtype)}
        key = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]
        self.root = config.directory
        self.directory = self.root / key
        self.dtype = dtype
        self._budget_gib = config.max_gib
        try:
            with disk_errors(self.directory):
                self.directory.mkdir(parents=True, exist_ok=True)
                write_json(self.directory / "settings.json", described)
        except (PermissionError, NotADirectoryError, FileExistsError) as error:
            raise ConfigError(f"the cache directory {self.root} cannot be written: {error.strerror}") from None

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        """The mapped tensor, of which memory holds what is touched; None when it is not there in this shape."""
        path = self._path(name)
        if not self._is_whole(path, self.num_bytes(shape)):
            return None
        return torch.from_file(str(path), shared=False, size=math.prod(shape), dtype=self.dtype).view(shape)

    def write(self, name: str, tensor: Tensor) -> None:
        """Raises DiskFullError."""
        assert tensor.dtype == self.dtype, f"{tensor.dtype} in files of {self.dtype}"
        path = self._path(name)
        temporary = path.with_name(f".{name}.{os.getpid()}.tmp")
        with disk_errors(path):
            path.parent.mkdir(exist_ok=True)
            try:
                temporary.write_bytes(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)

    def missing(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """Names that are not there in their shape, in the given order."""
        return [name for name, shape in shapes.items() if not self._is_whole(self._path(name), self.num_bytes(shape))]

    def reserve(self, shapes: Mapping[str, tuple[int, ...]], *, what: str, param: str) -> list[str]:
        """Names that are still to be written, having made room for them within the budget; all of shapes stay here
        as long as this process lives.

        what, param: what the files are and whose budget it is, for the message. Raises ConfigError, DiskFullError.
        """
        budget = self._budget_gib * 2**30
        needed = sum(self.num_bytes(shapes[name]) for name in self.missing(shapes))
        cache_room.hold(self.root, [self._path(name) for name in shapes], needed_bytes=needed, budget_bytes=budget)
        missing = self.missing(shapes)
        needed = sum(self.num_bytes(shapes[name]) for name in missing)
        total = sum(map(self.num_bytes, shapes.values()))
        held = cache_room.size_of(self.root)
        if held + needed > budget:
            raise ConfigError(
                f"{what} of {len(shapes)} images take {_gib(total)}, {_gib(needed)} of them not written yet; "
                f"{self.root} holds {_gib(held)} that are in use, and {param}.max_gib is {self._budget_gib:g}: raise "
                "it, lower pixels.max_pixels, or wait for the other runs that use the directory",
                param=f"train.{param}.max_gib",
            )
        free = shutil.disk_usage(self.root).free
        if needed > free:
            raise DiskFullError(
                f"{what} of {len(shapes)} images need {_gib(needed)} more, the disk of {self.root} has {_gib(free)}: "
                f"free space, or leave {param} out"
            )
        return missing

    def num_bytes(self, shape: Iterable[int]) -> int:
        return math.prod(shape) * self.dtype.itemsize

    def _path(self, name: str) -> Path:
        return self.directory / name[:2] / name

    @staticmethod
    def _is_whole(path: Path, num_bytes: int) -> bool:
        try:
            return path.stat().st_size == num_bytes
        except FileNotFoundError:
            return False


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.3g} GiB"
