"""The processes of one training: this one's device and place among them, and sums over all of them.

Gradients are summed once per optimizer step, over whatever parameters got one anywhere: ranks may run different numbers
of micro-batches, and text-only beside image batches, without waiting for each other (DistributedDataParallel would
hang). Knows nothing about losses.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn

LONGEST_WAIT: Final = timedelta(hours=4)
"""For another rank: the others wait while the first one writes a checkpoint, or an export and proves it. NCCL's own ten
minutes would end them. A rank that dies is noticed by torchrun, long before."""

_BUCKET_BYTES = 2**28


class Ranks:
    """One process without torchrun; under torchrun joins the group, gloo on CPUs and NCCL on GPUs."""

    def __init__(self) -> None:
        self._state = PartialState(cpu=not torch.cuda.is_available(), timeout=LONGEST_WAIT)
        assert self._state.device is not None, "PartialState chooses one"
        self.device = torch.device(self._state.device)
        self.rank = self._state.process_index
        self.count = self._state.num_processes

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def sum_number(self, number: int) -> int:
        """Sum of a number that each rank has at hand; a single process waits for no device."""
        if self.count == 1:
            return number
        return int(self.sum(torch.tensor(number, device=self.device)).item())

    def any(self, flag: bool) -> bool:
        """Whether any rank says so."""
        return self.sum_number(int(flag)) > 0

    def all(self, flag: bool) -> bool:
        """Whether every rank says so."""
        return self.sum_number(int(flag)) == self.count

    def gather(self, value: Any) -> list[Any]:
        """The value of each rank, by pickling: for rare and small things."""
        if self.count == 1:
            return [value]
        gathered: list[Any] = [None] * self.count
        dist.all_gather_object(gathered, value)
        return gathered

    def wait(self) -> None:
        """Until all ranks are here."""
        self._state.wait_for_everyone()

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum gradients over ranks. A parameter that has none on any rank keeps none, as in a single process."""
        if self.count == 1:
            return
        parameters = list(parameters)
        present = torch.tensor([float(p.grad is not None) for p in parameters], device=self.device)
        used = [p for p, count in zip(parameters, self.sum(present).tolist(), strict=True) if count]
        bucket: list[Tensor] = []
        for parameter in used:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            bucket.append(parameter.grad)
            if sum(gradient.nbytes for gradient in bucket) >= _BUCKET_BYTES:
                self._sum_bucket(bucket)
                bucket = []
        self._sum_bucket(bucket)

    def _sum_bucket(self, gradients: list[Tensor]) -> None:
        """One transfer for many small gradients."""
        if not gradients:
            return
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def leave(self) -> None:
        """End the group, so that this process may go on alone."""
        if self.count > 1:
            self.wait()
            self._state.destroy_process_group()
