"""One call of the head: supervised rows, a chunk at a time, to statistics and gradients.

A chunk meets the whole vocabulary once and its gradients are taken while its softmax is at hand. Objectives that weigh
whole sequences need every row's log-probability before the first gradient: for them each chunk is computed twice.
Knows nothing about autograd, shapes that do not fit, or what is summed up in the end.

Shapes: N supervised rows, C rows of a chunk, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlm_dft.heads.gradients import Gradients, zeros
from vlm_dft.heads.projection import Projection
from vlm_dft.heads.sparse import ColumnSparse
from vlm_dft.heads.tile import Tile, softmax
from vlm_dft.objectives import Objective, TokenStatistics


@dataclass(frozen=True)
class Request:
    """What one call asks for, beside the tensors that gradients flow to. Rows are the supervised ones."""

    labels_N: Tensor
    """int64."""
    objective: Objective
    wanted: frozenset[str]
    """Statistics to compute for the log: "entropy_N" and "correct"."""
    chunk_rows: int
    tolerance: float = 0.0
    scale: float = 1.0
    """What gradients are multiplied by."""
    reference: Projection | None = None
    ref_logp_N: Tensor | None = None
    segments_N: Tensor | None = None


@dataclass(frozen=True)
class RowResults:
    """What was found of each supervised row; statistics that were not wanted are None."""

    logp_N: Tensor
    weight_N: Tensor
    entropy_N: Tensor | None = None
    correct_N: Tensor | None = None
    kl_N: Tensor | None = None
    sparse_rows: int = 0
    """Rows whose gradients were column-sparse."""


def compute(
    projection: Projection, bias_V: Tensor | None, request: Request, needs: tuple[bool, ...]
) -> tuple[RowResults, Gradients]:
    """Results of every row, and the gradients of hidden states, weight and bias as far as they are needed."""
    return _Chunks(projection, bias_V, request, needs).run()


class _Chunks:
    def __init__(
        self, projection: Projection, bias_V: Tensor | None, request: Request, needs: tuple[bool, ...]
    ) -> None:
        self._projection = projection
        self._request = request
        self._gradients = Gradients(projection, bias_V, needs, request.scale)
        sparse = request.tolerance > 0 and request.objective.vanishing
        self._sparse = ColumnSparse(self._gradients, request.tolerance) if sparse else None
        self._sparse_rows = 0
        self._slices = _slices(request.labels_N.numel(), request.chunk_rows)
        # One buffer, used again by every chunk, of which the first has most rows.
        shape = (self._slices[0].stop, projection.vocabulary)
        self._logits_CV = zeros(shape, projection.exact, request.labels_N.device)
        self._reference_CV = zeros(shape, projection.exact, request.labels_N.device) if request.reference else None

    def run(self) -> tuple[RowResults, Gradients]:
        objective = self._request.objective
        statistics: list[dict[str, Tensor]] = []
        weights: list[Tensor] = []
        for rows in self._slices:
            tile = self._tile(rows, self._request.wanted | objective.needs)
            statistics.append(tile.statistics)
            if not objective.needs_segments:
                weights.append(objective.weights(self._token_statistics(tile.statistics, rows)))
                self._add(rows, tile, weights[-1])
        found = {name: torch.cat([part[name] for part in statistics]) for name in statistics[0]}
        if objective.needs_segments:
            weight_N = objective.weights(self._token_statistics(found, slice(None)))
            for rows in self._slices if self._gradients.wanted else ():
                self._add(rows, self._tile(rows, frozenset()), weight_N[rows])
        else:
            weight_N = torch.cat(weights)
        if self._sparse is not None:
            self._sparse.finish()
        results = RowResults(
            logp_N=found["logp"],
            weight_N=weight_N,
            entropy_N=found.get("entropy_N"),
            correct_N=found.get("correct"),
            kl_N=found.get("kl"),
            sparse_rows=self._sparse_rows,
        )
        return results, self._gradients

    def _tile(self, rows: slice, wanted: frozenset[str]) -> Tile:
        count = rows.stop - rows.start
        logits_CV = self._projection.logits(rows, self._logits_CV[:count])
        reference_CV = None
        if self._request.reference is not None:
            assert self._reference_CV is not None
            reference_CV = self._request.reference.logits(rows, self._reference_CV[:count])
        return softmax(logits_CV, self._request.labels_N[rows], wanted, reference_CV)

    def _token_statistics(self, found: dict[str, Tensor], rows: slice) -> TokenStatistics:
        request = self._request
        statistics = TokenStatistics(
            logp_N=found["logp"],
            entropy_N=found.get("entropy_N"),
            top_entropy_N=found.get("top_entropy_N"),
            sum_p2_N=found.get("sum_p2_N"),
        )
        if request.ref_logp_N is not None:
            statistics = replace(statistics, ref_logp_N=request.ref_logp_N[rows].to(found["logp"].dtype))
        if request.segments_N is not None:
            statistics = replace(statistics, segments_N=request.segments_N[rows])
        return statistics

    def _add(self, rows: slice, tile: Tile, weight_C: Tensor) -> None:
        if not self._gradients.wanted:
            return
        labels_C = self._request.labels_N[rows]
        if self._sparse is not None and self._sparse.add(rows, tile, weight_C, labels_C):
            self._sparse_rows += labels_C.numel()
        else:
            self._gradients.add(rows, tile, weight_C, labels_C, self._request.objective.kl_weight)


def _slices(rows: int, chunk_rows: int) -> list[slice]:
    """As many as chunk_rows asks for, of one size: a small last chunk would be the slowest."""
    step = math.ceil(rows / math.ceil(rows / chunk_rows))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
