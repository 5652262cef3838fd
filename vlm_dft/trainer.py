"""Train one model as a TrainConfig says, in a run directory: ``train``.

Loads or resumes, measures held-out loss, steps, writes checkpoints, stops when asked, exports. How a step works is
``vlm_dft.optimization``'s, what it is made of ``vlm_dft.batches``'s. Interrupted equals uninterrupted, bit for bit on
one device: a step depends on weights, optimizer, schedule and its own number, and on nothing else. (On a GPU as far as
its kernels repeat themselves: FlashAttention's backward pass sums in any order.)
Knows nothing about queues, leases or result.json.
"""

from __future__ import annotations

import dataclasses
import logging
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import vlm_dft.torchvision_shim  # noqa: F401

# isort: split
import torch
from peft import PeftModel

from vlm_dft import checkpoint
from vlm_dft.accuracy_probe import AccuracyProbe
from vlm_dft.batches import Corpus, Plan, Steps, num_loader_workers, open_corpus
from vlm_dft.checkpoint import State
from vlm_dft.config import FullConfig, LoraConfig, TrainConfig
from vlm_dft.data.canonical import CanonicalDataset
from vlm_dft.data.encoding import IMAGE_BACKEND, Encoder
from vlm_dft.errors import DatasetError, ModelError
from vlm_dft.export import ExportRecord, export
from vlm_dft.interruption import Interrupted, StopRequest
from vlm_dft.model import LoadedModel, adapt, load
from vlm_dft.model_files import locate, model_fingerprint
from vlm_dft.optimization import Optimization, StepOutcome
from vlm_dft.pictures import Pictures
from vlm_dft.probe import Probe
from vlm_dft.ranks import Ranks
from vlm_dft.reference import attach_target_logp
from vlm_dft.results import StepMetrics, TrainResult, ValidationMetrics
from vlm_dft.run_dir import RunDir
from vlm_dft.samples import Samples
from vlm_dft.telemetry import Reporter, checkpoint_metrics, step_metrics, validation_metrics

log = logging.getLogger(__name__)

_VERSIONS = ("torch", "transformers", "peft", "vlm-dft")


def train(config: TrainConfig, run: RunDir, *, stop: StopRequest | None = None) -> TrainResult:
    """Train, export, and say what came out; under torchrun, together with the other ranks.

    Resumes from config.resume_from, else from the newest complete checkpoint that this run directory holds. Raises
    Interrupted after writing a checkpoint when stop is requested, and VlmDftError.
    """
    ranks = Ranks()
    reporter = Reporter(run, writes=ranks.is_first)
    reporter.phase("loading_model")
    training = _Training(config, run, ranks, reporter, stop or StopRequest())
    result = training.run()
    ranks.leave()
    return result


class _Training:
    """One attempt."""

    def __init__(self, config: TrainConfig, run: RunDir, ranks: Ranks, reporter: Reporter, stop: StopRequest) -> None:
        self.config, self.run_dir, self.ranks, self.reporter, self.stop = config, run, ranks, reporter, stop
        if ranks.is_first:
            checkpoint.remove_leftovers(run)
        resume = _resume_path(config, run)
        fingerprint = CanonicalDataset.open(config.dataset).manifest.fingerprint
        base = model_fingerprint(locate(config.model, config.revision))
        self.state = State(config=checkpoint.identity(config), fingerprint=fingerprint, model=base)
        if resume is not None:
            self.state = checkpoint.open_checkpoint(resume, config, fingerprint, base)
        self.resumed_from_step = self.state.step if resume is not None else None
        self.best = checkpoint.best_weights(resume, self.state) if resume is not None else None
        self.loaded = _load(config, resume, ranks)
        self.pictures = Pictures(self.loaded, config, ranks)
        self.corpus = self._open(config.dataset)
        self.plan = Plan(
            self.corpus.kept, config.batch_size, seed=config.seed, epochs=config.n_epochs, max_steps=config.max_steps
        )
        self.steps = self._steps(self.corpus, self.plan, num_loader_workers(ranks.device, ranks.count))
        self.validation = self._open_validation()
        self.optimization = Optimization(self.loaded, config, ranks, self.plan.total_steps)
        used = [self.steps] if self.validation is None else [self.steps, self.validation]
        with self.optimization.out_of_memory_explained():
            self.pictures.prepare(*((steps.corpus, steps.plan) for steps in used))
            if self.optimization.objective.needs_ref_logp:
                attach_target_logp(used, self.loaded, config, run, ranks)
        if resume is not None:
            self._resume(resume)
        self.probes = [
            Probe("train" if steps is self.steps else "validation", steps, self.loaded, config.probe_rows, config.seed)
            for steps in used
            if config.probe_rows
        ]
        self.accuracy_probe = config.accuracy_probe and AccuracyProbe(config.accuracy_probe, self.loaded, config.pixels)
        self.samples = Samples(used[-1], self.loaded, config) if config.sample_rows else None
        self.reporter.forget_after(self.state.step)

    def run(self) -> TrainResult:
        """Everything after loading."""
        began = time.monotonic()
        self.reporter.start(self.state.step, self.plan.total_steps)
        with self.stop.put_off():
            self._train()
        if not self.state.trained_tokens:
            raise DatasetError("no row of the training data has a token to train on: check its assistant turns")
        self.reporter.phase("exporting")
        weights = self.optimization.weights()
        del self.optimization  # its memory is needed to reload the export
        if weights is not None and self.ranks.is_first:
            # A model of its own: this rank cannot run alone the one whose layers are cut over all.
            self.loaded = _load(self.config, None, self.ranks)
            self.loaded.model.load_state_dict(weights)
        if self.ranks.is_first and self.state.best_step not in (None, self.state.step):
            self._take_best_weights()
        target = self.run_dir.export_path
        record = self.ranks.gather(export(self.loaded, target) if self.ranks.is_first else None)[0]
        return self._result(record, time.monotonic() - began)

    def _train(self) -> None:
        if self.state.step == 0:
            measured = self._validate()
            self.state = self.state.model_copy(update={"valid_nll_before": measured and measured.valid_nll})
            self._probe()
            self._stop_if_asked()
            self._measure_accuracy()
        ended = self._has_stopped_growing or self.state.step == self.plan.total_steps
        if ended and self.state.valid_step != self.state.step:
            self._validate()  # an earlier attempt was asked to stop in the middle of that
            self._stop_if_asked()
        if ended:
            return
        finished = time.monotonic()
        for micro_batches in self.steps.read(self.state.step):
            waited = time.monotonic() - finished
            outcome = self.optimization.step(self.state.step, micro_batches)
            metrics = self._record(outcome, time.monotonic() - finished, waited)
            stopping = self.ranks.any(self.stop.requested)
            is_last = self.state.step == self.plan.total_steps
            is_best = self._measure_accuracy()
            ends = self._has_stopped_growing
            every = self.config.probe_every_steps
            if is_last or ends or (every is not None and self.state.step % every == 0):
                self._probe()
            if stopping or is_last or ends or is_best or self.state.step % self.config.checkpoint_every_steps == 0:
                self._checkpoint(metrics)
                self._stop_if_asked()
            if ends:
                log.info("the probe's accuracy has stopped growing: ending after step %d", self.state.step)
                return
            finished = time.monotonic()

    def _record(self, outcome: StepOutcome, seconds: float, waited_seconds: float) -> StepMetrics:
        """Count a step that was done; log it when it is one of those to log."""
        counts, before = outcome.counts, self.state
        self.state = before.model_copy(
            update={
                "step": before.step + 1,
                "trained_tokens": before.trained_tokens + counts.num_tokens,
                "input_tokens": before.input_tokens + counts.input_tokens,
                "num_samples": before.num_samples + counts.num_samples,
                "first_nll": before.first_nll if before.step else counts.nll,
                "last_nll": counts.nll,
            }
        )
        step = self.state.step
        metrics = step_metrics(
            counts,
            step=step,
            epoch=step / self.plan.steps_per_epoch,
            grad_norm=outcome.grad_norm,
            learning_rate=outcome.learning_rate,
            seconds=seconds,
            waited_seconds=waited_seconds,
            device=self.ranks.device,
            anchored=self.optimization.objective.needs_reference,
        )
        if step % self.config.log_every_steps == 0 or step == self.plan.total_steps:
            self.reporter.metrics(metrics)
        self.reporter.step_done(step, counts.input_tokens)
        return metrics

    def _validate(self) -> ValidationMetrics | None:
        """Held-out loss now; None when there is no validation set, or when we are asked to stop on the way."""
        if self.validation is None:
            return None
        measured = [self.optimization.measure([])]
        rows: list[tuple[str, ...]] = [()]
        for micro_batches in self.validation.read():
            if self.ranks.any(self.stop.requested):
                return None
            measured.append(self.optimization.measure(micro_batches))
            rows.append(tuple(row_id for micro_batch in micro_batches for row_id in micro_batch.row_ids))
        counts = self.optimization.counts(torch.stack(measured).sum(dim=0))
        if not counts.are_finite:
            bad = [row for one, some in zip(measured, rows, strict=True) if not one.isfinite().all() for row in some]
            self.optimization.raise_not_finite(f"held-out loss is {counts.nll}", self.state.step, bad)
        if not counts.num_tokens:
            raise DatasetError(
                f"no row of {self.config.validation_dataset} has a token to measure: check its assistant turns"
            )
        metrics = validation_metrics(counts, self.state.step)
        update = {"valid_nll": metrics.valid_nll, "valid_step": metrics.step}
        if metrics.step == self.state.best_step:
            update["best_valid_nll"] = metrics.valid_nll
        self.state = self.state.model_copy(update=update)
        self.reporter.metrics(metrics)
        return metrics

    def _probe(self) -> None:
        """Histograms of what the model gives the targets of its fixed rows now, and its own answers to some."""
        for probe in self.probes:
            with self.optimization.out_of_memory_explained():
                found = probe.measure(self.optimization, self.ranks, self.state.step)
            self.reporter.histograms(found)
        if self.samples is not None:
            self.reporter.samples(self.samples.answered(self.ranks, self.state.step))

    def _measure_accuracy(self) -> bool:
        """Answers to the fixed benchmark items now, where there are any and it is time; whether these weights are the
        best so far, to be kept."""
        probe = self.accuracy_probe
        if probe is None or not probe.is_due(self.state.step, self.plan.total_steps):
            return False
        self.reporter.phase("evaluating")
        point = probe.measure(self.ranks, self.state.step)
        update: dict[str, Any] = {"accuracies": (*self.state.accuracies, point)}
        if is_best := probe.is_best(update["accuracies"]):
            update |= {"best_step": point.step, "best_valid_nll": None}
        self.state = self.state.model_copy(update=update)
        self.reporter.accuracy(point)
        self.reporter.phase("running")
        return is_best

    @property
    def _has_stopped_growing(self) -> bool:
        return self.accuracy_probe is not None and self.accuracy_probe.ends(self.state.accuracies)

    def _checkpoint(self, metrics: StepMetrics) -> None:
        measured = self._validate()
        self.reporter.phase("checkpointing")
        training, weights = self.optimization.state_dict(), self.optimization.weights()
        if self.ranks.is_first:
            chosen = checkpoint_metrics(metrics, measured)
            path = checkpoint.save(self.run_dir, self.loaded, training, self.state, chosen, weights, self.best)
            self.best = checkpoint.best_weights(path, self.state)
            checkpoint.prune(self.run_dir, self.config.keep_checkpoints)
        self.ranks.wait()
        self.reporter.phase("running")

    def _take_best_weights(self) -> None:
        """Those that the accuracy probe found best, in place of the last ones."""
        assert self.best is not None, "the last checkpoint has them"
        log.info("exporting step %d, the best that was measured, of %d", self.state.best_step, self.state.step)
        if isinstance(self.loaded.model, PeftModel):
            checkpoint.load_adapter(self.best, self.loaded.model)
        else:
            self.loaded = _load(self.config, self.best, self.ranks)

    def _stop_if_asked(self) -> None:
        if self.ranks.any(self.stop.requested):
            raise Interrupted(f"asked to stop after step {self.state.step}")

    def _resume(self, path: Path) -> None:
        self.optimization.load_state_dict(checkpoint.load_training(path))
        log.info("resuming from %s, step %d of %d", path, self.state.step, self.plan.total_steps)

    def _open(self, path: Path) -> Corpus:
        encoder = Encoder(self.loaded.processor, self.config.pixels)
        tokenizer = locate(self.config.model, self.config.revision)
        return self.pictures.of(open_corpus(path, encoder, self.config, tokenizer))

    def _open_validation(self) -> Steps | None:
        if self.config.validation_dataset is None:
            return None
        corpus = self._open(self.config.validation_dataset)
        return self._steps(corpus, Plan(corpus.kept, self.config.batch_size, seed=None), num_workers=0)

    def _steps(self, corpus: Corpus, plan: Plan, num_workers: int) -> Steps:
        return Steps(
            corpus,
            plan,
            micro_batch_size=self.config.micro_batch_size,
            pad_token_id=self.loaded.pad_token_id,
            pack_length=self.config.pack_length,
            rank=self.ranks.rank,
            num_ranks=self.ranks.count,
            num_workers=num_workers,
            even=self.config.fsdp,
        )

    def _result(self, record: ExportRecord, seconds: float) -> TrainResult:
        state, device = self.state, self.ranks.device
        last_valid_nll = state.valid_nll if state.valid_step == state.step else None
        return TrainResult(
            steps=state.step,
            trained_tokens=state.trained_tokens,
            input_tokens=state.input_tokens,
            num_samples=state.num_samples,
            dropped_samples=self.corpus.dropped,
            first_nll=state.first_nll,
            last_nll=state.last_nll,
            valid_nll_before=state.valid_nll_before,
            valid_nll_after=last_valid_nll if state.best_step is None else state.best_valid_nll,
            wall_seconds=seconds,
            resumed_from_step=self.resumed_from_step,
            stopped_early=state.step < self.plan.total_steps,
            exported_step=state.step if state.best_step is None else state.best_step,
            export=str(record.path.relative_to(self.run_dir.path)),
            adapter=str(record.adapter.relative_to(self.run_dir.path)) if record.adapter else None,
            model_sha256=record.model_sha256,
            data_fingerprint=state.fingerprint,
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
            precision="bf16" if self.loaded.dtype == torch.bfloat16 else "fp32",
            image_backend=IMAGE_BACKEND,
            versions={name: version(name) for name in _VERSIONS},
        )


def _resume_path(config: TrainConfig, run: RunDir) -> Path | None:
    if config.resume_from is not None:
        return config.resume_from
    checkpoints = run.complete_checkpoints()
    return checkpoints[-1].path if checkpoints else None


def _load(config: TrainConfig, resume: Path | None, ranks: Ranks) -> LoadedModel:
    """The model with its trainable parameters marked; their weights come from the checkpoint that is resumed from."""
    full = isinstance(config.adapter, FullConfig)
    source, revision = (str(resume), None) if resume is not None and full else (config.model, config.revision)
    loaded = load(
        source,
        revision=revision,
        precision=config.precision,
        device=ranks.device,
        master_weights=full,
        quantization=config.adapter.quantization if isinstance(config.adapter, LoraConfig) else None,
    )
    model = loaded.model
    if isinstance(model, PeftModel):
        if not full:
            raise ModelError(
                f"{config.model} is an adapter: train lora from the exported model instead", param="train.model"
            )
        model = model.merge_and_unload()
    model = adapt(model, config.adapter, config.freeze, config.seed)
    if resume is not None and isinstance(model, PeftModel):
        checkpoint.load_adapter(resume, model)
    return dataclasses.replace(loaded, model=model)
