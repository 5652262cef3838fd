"""Which samples make up which optimizer step, and those steps as batches of tensors.

The order depends on seed and epoch alone; a step's global batch is cut over ranks and micro-batches afterwards, so that
the layout changes memory and speed and never what a step is made of. A step is found by its number: a resumed run reads
nothing of what it skips.
Knows nothing about models or losses.
"""

from __future__ import annotations

import hashlib
import logging
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vlm_dft.config import TrainConfig
from vlm_dft.data.canonical import ROWS_NAME, CanonicalDataset, Row
from vlm_dft.data.collate import collate
from vlm_dft.data.encoding import Encoder, Sample
from vlm_dft.data.tokens import row_tokens, tokenizer_sha256
from vlm_dft.errors import DatasetError, SampleTooLongError, VlmDftError
from vlm_dft.head import IGNORED

log = logging.getLogger(__name__)

_NAMED_ROWS = 5
_CACHE_BYTES = 2**30


class Rows:
    """Random access to a canonical dataset's rows; keeps their places in the file, not the rows."""

    def __init__(self, dataset: CanonicalDataset) -> None:
        self._path: Path = dataset.path / ROWS_NAME
        self._offsets: list[int] = []
        with self._path.open("rb") as file:
            offset = 0
            for line in file:
                self._offsets.append(offset)
                offset += len(line)
        if len(self._offsets) != len(dataset):
            raise DatasetError(
                f"{self._path} has {len(self._offsets)} rows, {dataset.path}'s manifest says {len(dataset)}: "
                "validate the file again"
            )

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> Row:
        with self._path.open("rb") as file:
            file.seek(self._offsets[index])
            return Row.model_validate_json(file.readline())


@dataclass(frozen=True)
class Corpus:
    """A dataset as one model sees it: which rows fit, and how long they are."""

    dataset: CanonicalDataset
    rows: Rows
    encoder: Encoder
    kept: tuple[int, ...]
    """Indices of the rows that fit."""
    lengths: dict[int, int]
    """Tokens of each kept row, text and visual."""

    @property
    def dropped(self) -> int:
        return len(self.rows) - len(self.kept)

    def sample(self, index: int) -> Sample:
        return self.encoder.encode(self.rows[index], self.dataset)


def open_corpus(path: Path, encoder: Encoder, config: TrainConfig, tokenizer: Path) -> Corpus:
    """Measure every row, without opening an image; rows over the limit are refused or left out, as the config says.

    tokenizer: the model's directory; when validation counted with the same one, its counts are taken.

    Raises SampleTooLongError naming rows, DatasetError when nothing is left.
    """
    dataset = CanonicalDataset.open(path)
    rows = Rows(dataset)
    counted = dataset.manifest.tokenizer_sha256 == tokenizer_sha256(tokenizer)
    lengths, overlong = {}, []
    for index in range(len(rows)):
        row = rows[index]
        use_count = counted and row.text_tokens is not None
        length = row_tokens(row, config.pixels) if use_count else encoder.num_tokens(row)
        if length <= config.max_length_tokens:
            lengths[index] = length
        else:
            overlong.append(f"{row.id} ({length} tokens)")
    _report_overlong(path, overlong, config)
    if not lengths:
        raise DatasetError(f"{path} has no row to train on: {len(rows)} rows, {len(overlong)} of them too long")
    return Corpus(dataset, rows, encoder, tuple(lengths), lengths)


def _report_overlong(path: Path, overlong: list[str], config: TrainConfig) -> None:
    if not overlong:
        return
    named = ", ".join(overlong[:_NAMED_ROWS]) + (", ..." if len(overlong) > _NAMED_ROWS else "")
    found = f"{len(overlong)} rows of {path} are longer than max_length_tokens {config.max_length_tokens}: {named}"
    if config.on_overlong == "error":
        raise SampleTooLongError(
            f"{found}. Raise max_length_tokens, lower pixels.max_pixels, or set on_overlong to drop",
            param="train.max_length_tokens",
        )
    log.warning("left out: %s", found)


def derived_seed(*parts: int) -> int:
    """One seed of 32 bits from several numbers: torch's CPU generator ignores all higher bits."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4])


class Plan:
    """Step number -> indices of its global batch. Steps are counted from 0."""

    def __init__(
        self,
        indices: tuple[int, ...],
        batch_size: int,
        *,
        seed: int | None,
        epochs: int = 1,
        max_steps: int | None = None,
    ) -> None:
        """seed None: in the given order, for validation. max_steps decides when it is given, epochs otherwise."""
        self.indices = indices
        self.batch_size = batch_size
        self.seed = seed
        self.steps_per_epoch = -(-len(indices) // batch_size)
        self.total_steps = max_steps or epochs * self.steps_per_epoch
        self._shuffled: tuple[int, list[int]] = (-1, [])

    def batch(self, step: int) -> list[int]:
        """The last batch of an epoch is as small as what is left: no sample is repeated, none is left out."""
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.batch_size
        return [self.indices[place] for place in self._order(epoch)[start : start + self.batch_size]]

    def _order(self, epoch: int) -> list[int]:
        if self.seed is None:
            return list(range(len(self.indices)))
        if self._shuffled[0] != epoch:
            generator = torch.Generator().manual_seed(derived_seed(self.seed, epoch))
            self._shuffled = (epoch, torch.randperm(len(self.indices), generator=generator).tolist())
        return self._shuffled[1]


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass takes."""

    inputs: dict[str, Tensor]
    """The model's inputs, without labels."""
    labels_BT: Tensor  # noqa: N815
    """Shifted: beside the position that predicts them."""
    row_ids: tuple[str, ...]
    num_tokens: int
    """Supervised ones."""
    input_tokens: int
    """All but padding."""

    @property
    def padded_tokens(self) -> int:
        """What a forward pass computes."""
        return self.labels_BT.numel()

    def to(self, device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
        inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in self.inputs.items()}
        return inputs, self.labels_BT.to(device, non_blocking=True)


class Steps(Dataset[Any]):
    """Step number -> this rank's micro-batches, or the error of a sample that could not be encoded."""

    def __init__(
        self,
        corpus: Corpus,
        plan: Plan,
        *,
        micro_batch_size: int,
        pad_token_id: int,
        rank: int = 0,
        num_ranks: int = 1,
        num_workers: int = 0,
    ) -> None:
        """num_workers: processes that prepare steps ahead of time."""
        self.corpus = corpus
        self.plan = plan
        self.micro_batch_size = micro_batch_size
        self.pad_token_id = pad_token_id
        self.rank, self.num_ranks = rank, num_ranks
        self.num_workers = num_workers
        self._cache: dict[int, Sample] = {}
        self._cache_room = 0 if num_workers else _CACHE_BYTES

    def __getitem__(self, step: int) -> list[MicroBatch] | VlmDftError:
        share = self.plan.batch(step)[self.rank :: self.num_ranks]
        # Samples of like length share a micro-batch: less padding, the same sum.
        share = sorted(share, key=self.corpus.lengths.__getitem__)
        size = self.micro_batch_size
        try:
            return [self._micro_batch(share[start : start + size]) for start in range(0, len(share), size)]
        except VlmDftError as error:
            # Returned, because a loader process would re-raise it as another exception.
            return error

    def _micro_batch(self, indices: list[int]) -> MicroBatch:
        samples = [self._sample(index) for index in indices]
        inputs = collate(samples, self.pad_token_id)
        labels_BT = inputs.pop("labels")
        shifted_BT = torch.nn.functional.pad(labels_BT[:, 1:], (0, 1), value=IGNORED)
        return MicroBatch(
            inputs=inputs,
            labels_BT=shifted_BT,
            row_ids=tuple(sample.row_id for sample in samples),
            num_tokens=int((shifted_BT != IGNORED).sum()),
            input_tokens=sum(len(sample) for sample in samples),
        )

    def _sample(self, index: int) -> Sample:
        """Encoded once where memory allows: a small dataset costs its images and tokens in the first epoch only."""
        if index in self._cache:
            return self._cache[index]
        sample = self.corpus.sample(index)
        self._cache_room -= _num_bytes(sample)
        if self._cache_room >= 0:
            self._cache[index] = sample
        return sample

    def read(self, start: int = 0) -> Iterator[list[MicroBatch]]:
        """Steps from start to the plan's end, in order. Raises the DatasetError of a sample that cannot be encoded."""
        loader = DataLoader(
            self,
            batch_size=None,
            sampler=range(start, self.plan.total_steps),  # pyright: ignore[reportArgumentType]  (any iterable will do)
            num_workers=self.num_workers,
            worker_init_fn=_start_worker if self.num_workers else None,
        )
        for item in loader:
            if isinstance(item, VlmDftError):
                raise item
            yield item


def _num_bytes(sample: Sample) -> int:
    return sum(value.nbytes for value in vars(sample).values() if isinstance(value, Tensor))


def _start_worker(_: int) -> None:
    # The loader's processes are the trainer's to end: its own signal handling is not theirs.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def num_loader_workers(device: torch.device, num_ranks: int) -> int:
    """Processes that prepare batches beside a GPU; on a CPU the cores are busy with the model itself."""
    if device.type == "cpu":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores // num_ranks - 1))
