"""Which samples make up which optimizer step, and those steps as batches of tensors.

The order depends on seed and epoch alone; a step's global batch is cut over ranks and micro-batches afterwards, so that
the layout changes memory and speed and never what a step is made of. A step is found by its number: a resumed run reads
nothing of what it skips.
Knows nothing about models or losses.

Shapes: B rows of a micro-batch (1 for a pack), T tokens of a row, N = B x T.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vlm_dft.config import TrainConfig
from vlm_dft.data.canonical import ROWS_NAME, CanonicalDataset, Row
from vlm_dft.data.collate import collate, pack
from vlm_dft.data.encoding import Encoder, Sample
from vlm_dft.data.pixels import num_visual_tokens
from vlm_dft.data.tokens import row_tokens, tokenizer_sha256
from vlm_dft.errors import DatasetError, SampleTooLongError, VlmDftError
from vlm_dft.head import IGNORED
from vlm_dft.packing import Size, balanced, packed

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


class PictureSource(Protocol):
    """A cache of pictures (``vlm_dft.pictures``)."""

    def attach(self, sample: Sample) -> Sample:
        """A sample that encode_tokens made, with its pictures."""
        ...


class RowValues(Protocol):
    """Numbers that belong to the supervised tokens of rows (``vlm_dft.reference``)."""

    def __getitem__(self, row_id: str) -> Tensor: ...


@dataclass(frozen=True)
class Corpus:
    """A dataset as one model sees it: which rows fit, and how long they are."""

    dataset: CanonicalDataset
    rows: Rows
    encoder: Encoder
    kept: tuple[int, ...]
    """Indices of the rows that fit."""
    sizes: dict[int, Size]
    """Of each kept row."""

    pictures: PictureSource | None = None
    """Attaches pictures to samples; None: samples bring their own, decoded from the image files."""

    @property
    def dropped(self) -> int:
        return len(self.rows) - len(self.kept)

    def sample(self, index: int) -> Sample:
        """One row encoded; without pictures where a cache attaches them."""
        row = self.rows[index]
        return self.encoder.encode(row, self.dataset) if self.pictures is None else self.encoder.encode_tokens(row)


def open_corpus(path: Path, encoder: Encoder, config: TrainConfig, tokenizer: Path) -> Corpus:
    """Measure every row, without opening an image; rows over the limit are refused or left out, as the config says.

    tokenizer: the model's directory; when validation counted with the same one, its counts are taken.

    Raises SampleTooLongError naming rows, DatasetError when nothing is left.
    """
    dataset = CanonicalDataset.open(path)
    rows = Rows(dataset)
    counted = dataset.manifest.tokenizer_sha256 == tokenizer_sha256(tokenizer)
    _, limit = config.sample_limit
    sizes, overlong = {}, []
    for index in range(len(rows)):
        row = rows[index]
        use_count = counted and row.text_tokens is not None
        length = row_tokens(row, config.pixels) if use_count else encoder.num_tokens(row)
        if length <= limit:
            visual = sum(num_visual_tokens(part.width, part.height, config.pixels) for part in row.images)
            sizes[index] = Size(length, visual)
        else:
            overlong.append(f"{row.id} ({length} tokens)")
    _report_overlong(path, overlong, config)
    if not sizes:
        raise DatasetError(f"{path} has no row to train on: {len(rows)} rows, {len(overlong)} of them too long")
    return Corpus(dataset, rows, encoder, tuple(sizes), sizes)


def _report_overlong(path: Path, overlong: list[str], config: TrainConfig) -> None:
    if not overlong:
        return
    named = ", ".join(overlong[:_NAMED_ROWS]) + (", ..." if len(overlong) > _NAMED_ROWS else "")
    name, limit = config.sample_limit
    found = f"{len(overlong)} rows of {path} are longer than {name} {limit}: {named}"
    if config.on_overlong == "error":
        raise SampleTooLongError(
            f"{found}. Raise {name}, lower pixels.max_pixels, or set on_overlong to drop", param=f"train.{name}"
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

    def used(self) -> list[int]:
        """The rows that its steps take, in the order of the dataset."""
        if self.total_steps >= self.steps_per_epoch:
            return list(self.indices)
        return sorted({index for step in range(self.total_steps) for index in self.batch(step)})

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
    labels_BT: Tensor
    """Shifted: beside the position that predicts them."""
    row_ids: tuple[str, ...]
    num_tokens: int
    """Supervised ones."""
    input_tokens: int
    """All but padding."""
    segment_lengths: tuple[int, ...] | None = None
    """Of a pack: tokens of each of its samples."""
    ref_logp_N: Tensor | None = None
    """Log-probabilities of the targets under the base model, where the objective asks for them."""

    @property
    def padded_tokens(self) -> int:
        """What a forward pass computes."""
        return self.labels_BT.numel()

    @property
    def segments_N(self) -> Tensor:  # noqa: N802  shapes are suffixes
        """Which sample, 0..., a position belongs to."""
        rows, tokens = self.labels_BT.shape
        lengths = torch.tensor(self.segment_lengths or (tokens,) * rows)
        return torch.arange(len(lengths)).repeat_interleave(lengths)

    def inputs_on(self, device: torch.device) -> dict[str, Tensor]:
        return {name: tensor.to(device, non_blocking=True) for name, tensor in self.inputs.items()}


class Steps(Dataset[Any]):
    """Step number -> this rank's micro-batches, or the error of a sample that could not be encoded."""

    def __init__(
        self,
        corpus: Corpus,
        plan: Plan,
        *,
        micro_batch_size: int,
        pad_token_id: int,
        pack_length: int | None = None,
        rank: int = 0,
        num_ranks: int = 1,
        num_workers: int = 0,
        even: bool = False,
    ) -> None:
        """pack_length: tokens of a pack, for packing. num_workers: processes that prepare steps ahead of time.

        even: as many micro-batches on every rank, filled up with empty ones: what runs layers that are cut over ranks.
        """
        self.corpus = corpus
        self.plan = plan
        self.micro_batch_size = micro_batch_size
        self.pad_token_id = pad_token_id
        self.pack_length = pack_length
        self.rank, self.num_ranks = rank, num_ranks
        self.num_workers = num_workers
        self.even = even
        self.ref_logp: RowValues | None = None
        """By row id: what the base model gives each target."""
        self._cache: dict[int, Sample] = {}
        self._cache_room = _CACHE_BYTES // max(1, num_workers)

    def __getitem__(self, step: int) -> list[MicroBatch] | VlmDftError:
        try:
            return [
                self._micro_batch(indices) if indices else self._nothing()
                for indices in self.layout(self.plan.batch(step))
            ]
        except VlmDftError as error:
            # Returned, because a loader process would re-raise it as another exception.
            return error

    def once(self, indices: Sequence[int], *, num_workers: int | None = None) -> Steps:
        """Steps that take these rows of the same corpus once, in this order, laid out as this one's are."""
        steps = copy.copy(self)
        steps.plan = Plan(tuple(indices), self.plan.batch_size, seed=None)
        steps.num_workers = self.num_workers if num_workers is None else num_workers
        return steps

    def layout(self, batch: list[int]) -> list[list[int]]:
        """This rank's micro-batches of a global batch, by the rows' numbers; nothing is opened."""
        mine = self._layout(batch, self.rank)
        if not self.even:
            return mine
        most = max(len(self._layout(batch, rank)) for rank in range(self.num_ranks))
        return mine + [[]] * (most - len(mine))

    def _layout(self, batch: list[int], rank: int) -> list[list[int]]:
        sizes = self.corpus.sizes
        if self.pack_length is not None:
            share = [batch[place] for place in balanced([sizes[index] for index in batch], self.num_ranks)[rank]]
            packs = packed([sizes[index] for index in share], self.pack_length)
            return [[share[place] for place in places] for places in packs]
        # Samples of like length share a micro-batch: less padding, the same sum.
        share = sorted(batch[rank :: self.num_ranks], key=lambda index: sizes[index].tokens)
        return [share[start : start + self.micro_batch_size] for start in range(0, len(share), self.micro_batch_size)]

    def _nothing(self) -> MicroBatch:
        """One token that counts for nothing."""
        ids_BT = torch.tensor([[self.pad_token_id]])
        inputs = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}
        ref_logp_N = None if self.ref_logp is None else torch.zeros(1)
        labels_BT = torch.full_like(ids_BT, IGNORED)
        return MicroBatch(inputs, labels_BT, (), num_tokens=0, input_tokens=0, ref_logp_N=ref_logp_N)

    def _micro_batch(self, indices: list[int]) -> MicroBatch:
        samples = [self._sample(index) for index in indices]
        lengths = tuple(len(sample) for sample in samples)
        inputs = collate(samples, self.pad_token_id) if self.pack_length is None else pack(samples)
        shifted_BT = torch.nn.functional.pad(inputs.pop("labels")[:, 1:], (0, 1), value=IGNORED)
        if self.pack_length is not None:
            # No sample's last token predicts the next sample's first.
            shifted_BT[:, torch.tensor(lengths).cumsum(0) - 1] = IGNORED
        ref_logp_N = None
        if self.ref_logp is not None:
            ref_logp_N = torch.zeros(shifted_BT.numel())
            ref_logp_N[shifted_BT.flatten() != IGNORED] = torch.cat([self.ref_logp[s.row_id] for s in samples])
        return MicroBatch(
            inputs=inputs,
            labels_BT=shifted_BT,
            row_ids=tuple(sample.row_id for sample in samples),
            num_tokens=int((shifted_BT != IGNORED).sum()),
            input_tokens=sum(lengths),
            segment_lengths=None if self.pack_length is None else lengths,
            ref_logp_N=ref_logp_N,
        )

    def _sample(self, index: int) -> Sample:
        """Encoded once where memory allows: a small dataset costs its images and tokens in the first epoch only."""
        sample = self._cache.get(index)
        if sample is None:
            sample = self.corpus.sample(index)
            self._cache_room -= _num_bytes(sample)
            if self._cache_room >= 0:
                self._cache[index] = sample
        return sample if self.corpus.pictures is None else self.corpus.pictures.attach(sample)

    def read(self, start: int = 0) -> Iterator[list[MicroBatch]]:
        """Steps from start to the plan's end, in order. Raises the DatasetError of a sample that cannot be encoded."""
        loader = DataLoader(
            self,
            batch_size=None,
            sampler=range(start, self.plan.total_steps),  # pyright: ignore[reportArgumentType]  (any iterable will do)
            num_workers=self.num_workers,
            worker_init_fn=start_loader_process if self.num_workers else None,
        )
        for item in loader:
            if isinstance(item, VlmDftError):
                raise item
            yield item


def _num_bytes(sample: Sample) -> int:
    return sum(value.nbytes for value in vars(sample).values() if isinstance(value, Tensor))


def start_loader_process(_: int) -> None:
    # The loader's processes are the trainer's to end: its own signal handling is not theirs.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def num_loader_workers(device: torch.device, num_ranks: int) -> int:
    """Processes that prepare batches beside a GPU; on a CPU the cores are busy with the model itself."""
    if device.type == "cpu":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores // num_ranks - 1))
