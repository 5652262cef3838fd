"""Which objective suits a model and a dataset, before anything is trained: one forward pass over a sample of rows.

What the model makes of each supervised token is counted by parts (``preflight_parts``); the verdict that follows from
the counts is ``preflight_verdict``. Knows nothing about queues, and changes nothing.

Shapes: M supervised tokens of a micro-batch, N positions.
"""

from __future__ import annotations

import logging
import platform
import time

import vlm_dft.torchvision_shim  # noqa: F401

# isort: split
import torch

from vlm_dft import objectives
from vlm_dft.batches import Corpus, MicroBatch, Plan, Steps, num_loader_workers, open_corpus
from vlm_dft.config import PreflightConfig, TrainConfig
from vlm_dft.data.encoding import Encoder
from vlm_dft.errors import DatasetError, NanLossError, OutOfMemoryError
from vlm_dft.forward import Forward
from vlm_dft.head import IGNORED
from vlm_dft.heads.chunks import Request, RowResults, compute
from vlm_dft.heads.projection import Projection
from vlm_dft.interruption import Interrupted, StopRequest
from vlm_dft.model import LoadedModel, load
from vlm_dft.model_files import locate
from vlm_dft.preflight_parts import Tally, parts_of
from vlm_dft.preflight_report import PreflightReport
from vlm_dft.preflight_verdict import decide
from vlm_dft.results import Progress
from vlm_dft.run_dir import RunDir

log = logging.getLogger(__name__)

_CHUNK_ELEMENTS = 5 * 2**22


def preflight(config: PreflightConfig, run: RunDir, *, stop: StopRequest | None = None) -> PreflightReport:
    """Load the model, look at the sample, say what suits it.

    Raises ModelError, DatasetError when no row fits or none has a supervised token, OutOfMemoryError, Interrupted.
    """
    run.write_progress(Progress(phase="loading_model"))
    loaded = load(config.model, revision=config.revision, precision=config.precision)
    corpus = _open(config, loaded)
    steps = _steps(config, corpus, loaded)
    tally = Tally()
    began = time.monotonic()
    forward = Forward(loaded, packing=False)
    run.write_progress(Progress(phase="running", items_done=0, items_total=steps.plan.total_steps))
    for done, micro_batches in enumerate(steps.read()):
        if stop is not None and stop.requested:
            raise Interrupted(f"asked to stop after {done} rows")
        for micro_batch in micro_batches:
            _look_at(micro_batch, forward, loaded, tally)
        run.write_progress(Progress(phase="running", items_done=done + 1, items_total=steps.plan.total_steps))
    if not tally.num_tokens:
        raise DatasetError("no row of the sample has a token to train on: check its assistant turns")
    parts, rows = tally.evidence()
    verdict = decide(parts, rows)
    log.info("verdict: %s: %s", verdict.label, verdict.reasons[0])
    return PreflightReport(
        num_rows=steps.plan.total_steps,
        num_rows_total=len(corpus.rows),
        num_rows_too_long=corpus.dropped,
        parts=parts,
        rows=rows,
        verdict=verdict,
        data_fingerprint=corpus.dataset.manifest.fingerprint,
        device=torch.cuda.get_device_name(loaded.device) if loaded.device.type == "cuda" else _cpu(),
        precision="bf16" if loaded.dtype == torch.bfloat16 else "fp32",
        wall_seconds=time.monotonic() - began,
    )


def _cpu() -> str:
    return f"cpu ({platform.machine()})"


def _open(config: PreflightConfig, loaded: LoadedModel) -> Corpus:
    """The dataset as a training with these settings would see it."""
    limits = TrainConfig(
        model=config.model,
        revision=config.revision,
        dataset=config.dataset,
        pixels=config.pixels,
        max_length_tokens=config.max_length_tokens,
        on_overlong="drop",
    )
    return open_corpus(
        config.dataset, Encoder(loaded.processor, config.pixels), limits, locate(config.model, config.revision)
    )


def _steps(config: PreflightConfig, corpus: Corpus, loaded: LoadedModel) -> Steps:
    """One row at a time: a sample is small, and padding would cost more than it saves."""
    sample = Plan(corpus.kept, min(config.num_rows, len(corpus.kept)), seed=config.seed).batch(0)
    return Steps(
        corpus,
        Plan(tuple(sorted(sample)), 1, seed=None),
        micro_batch_size=1,
        pad_token_id=loaded.pad_token_id,
        num_workers=num_loader_workers(loaded.device, 1),
    )


@torch.no_grad()
def _look_at(micro_batch: MicroBatch, forward: Forward, loaded: LoadedModel, tally: Tally) -> None:
    """Count the supervised tokens of one row."""
    labels_N = micro_batch.labels_BT.flatten()
    labels_M = labels_N[labels_N != IGNORED]
    if not labels_M.numel():
        tally.add_row_without_tokens()
        return
    try:
        results = _results(forward, micro_batch)
    except torch.OutOfMemoryError:
        raise OutOfMemoryError(
            f"row {micro_batch.row_ids[0]} with {micro_batch.input_tokens} tokens does not fit into the memory of "
            f"{loaded.device}: lower preflight.max_length_tokens or preflight.pixels.max_pixels"
        ) from None
    if not results.logp_N.isfinite().all():
        raise NanLossError(
            f"row {micro_batch.row_ids[0]}: the probability of a target is not finite: look at the model's weights, "
            "and at this row"
        )
    parts = parts_of(labels_M.tolist(), loaded.tokenizer, loaded.end_of_turn_token_id)
    assert results.entropy_N is not None, "it was asked for"
    assert results.correct_N is not None, "it was asked for"
    tally.add_row(parts, results.logp_N.tolist(), results.entropy_N.tolist(), results.correct_N.tolist())


def _results(forward: Forward, micro_batch: MicroBatch) -> RowResults:
    """Log-probability, entropy and whether it is the arg-max, of each supervised token."""
    head, labels_N = forward.head, micro_batch.labels_BT.flatten()
    hidden_ND = forward(micro_batch)
    is_label_N = (labels_N != IGNORED).to(hidden_ND.device)
    request = Request(
        labels_N=labels_N.to(hidden_ND.device)[is_label_N],
        objective=objectives.objective("nll"),
        wanted=frozenset({"entropy_N", "correct"}),
        chunk_rows=max(1, _CHUNK_ELEMENTS // head.weight.shape[0]),
    )
    projection = Projection(hidden_ND[is_label_N], head.weight, head.bias)
    return compute(projection, head.bias, request, (False, False, False))[0]
