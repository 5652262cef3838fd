"""Which part of an answer each of its tokens belongs to, and what was counted of each part.

Torch-free: it takes token ids, probabilities and a tokenizer. Knows nothing about models.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from vlm_dft.preflight_report import NUM_BINS, PARTS, Part, PartEvidence, RowEvidence

_TAG: Final = re.compile(r"</?[A-Za-z][A-Za-z_]*>")
_DIGIT: Final = re.compile(r"\d")


def parts_of(token_ids: Sequence[int], tokenizer: Any, end_of_turn: int) -> list[frozenset[Part]]:
    """The parts of each supervised token of one row, "all" left out.

    Tokens are looked at as the pieces that the tokenizer keeps, in which ASCII stands for itself: a piece that has a
    part of a tag belongs to it. Reasoning that is never closed goes on to the end of its turn.
    """
    pieces: list[str] = tokenizer.convert_ids_to_tokens(list(token_ids))
    found: list[frozenset[Part]] = []
    for start, end in _turns(token_ids, end_of_turn):
        found += _parts_of_turn(pieces[start:end])
        if end < len(pieces):
            found.append(frozenset({"end_of_turn"}))
    return found


def _turns(token_ids: Sequence[int], end_of_turn: int) -> list[tuple[int, int]]:
    """Start and end of each turn, its end-of-turn token left out; the last one may lack it."""
    ends = [index for index, token in enumerate(token_ids) if token == end_of_turn]
    starts = [0, *(end + 1 for end in ends)]
    spans = list(zip(starts, [*ends, len(token_ids)], strict=True))
    return [span for span in spans if span[0] < len(token_ids)]


def _parts_of_turn(pieces: Sequence[str]) -> list[frozenset[Part]]:
    text = "".join(pieces)
    tags = [match.span() for match in _TAG.finditer(text)]
    reasoning = [match.span() for match in re.finditer(r"<think>.*?(?:</think>|$)", text, re.DOTALL)]
    found: list[frozenset[Part]] = []
    start = 0
    for piece in pieces:
        end = start + len(piece)
        if _touches(start, end, tags):
            found.append(frozenset({"format"}))
        else:
            where: Part = "reasoning" if _touches(start, end, reasoning) else "answer"
            found.append(frozenset({where, "digits"}) if _DIGIT.search(piece) else frozenset({where}))
        start = end
    return found


def _touches(start: int, end: int, spans: Sequence[tuple[int, int]]) -> bool:
    return any(start < last and first < end for first, last in spans)


@dataclass
class _Sums:
    counts: list[int] = field(default_factory=lambda: [0] * NUM_BINS)
    p: float = 0.0
    nll: float = 0.0
    entropy: float = 0.0
    correct: int = 0
    below_001: int = 0
    below_01: int = 0
    gradient: float = 0.0
    dft_gradient: float = 0.0

    def add(self, logp: float, entropy: float, correct: bool) -> None:
        p = math.exp(logp)
        self.counts[min(int(p * NUM_BINS), NUM_BINS - 1)] += 1
        self.p += p
        self.nll -= logp
        self.entropy += entropy
        self.correct += correct
        self.below_001 += p < 0.01
        self.below_01 += p < 0.1
        self.gradient += 1 - p
        self.dft_gradient += p * (1 - p)

    def evidence(self, part: Part) -> PartEvidence:
        number = sum(self.counts)

        def share(value: float) -> float | None:
            return value / number if number else None

        return PartEvidence(
            part=part,
            num_tokens=number,
            counts=tuple(self.counts),
            p_sum=self.p,
            nll_sum=self.nll,
            entropy_sum=self.entropy,
            correct_count=self.correct,
            p_below_001_count=self.below_001,
            p_below_01_count=self.below_01,
            gradient_mass=self.gradient,
            dft_gradient_mass=self.dft_gradient,
            mean_p=share(self.p),
            nll=share(self.nll),
            entropy=share(self.entropy),
            accuracy=share(self.correct),
            share_p_below_001=share(self.below_001),
            share_p_below_01=share(self.below_01),
            dft_discards=1 - self.dft_gradient / self.gradient if self.gradient else None,
        )


class Tally:
    """What was counted so far, over rows."""

    def __init__(self) -> None:
        self._sums: dict[Part, _Sums] = {part: _Sums() for part in PARTS}
        self._rows = 0
        self._rows_below_01 = 0

    @property
    def num_tokens(self) -> int:
        return sum(self._sums["all"].counts)

    def add_row(
        self,
        parts: Sequence[frozenset[Part]],
        logp: Sequence[float],
        entropy: Sequence[float],
        correct: Sequence[bool],
    ) -> None:
        """One row's supervised tokens, in order."""
        improbable = False
        for where, token_logp, token_entropy, is_correct in zip(parts, logp, entropy, correct, strict=True):
            for part in ("all", *where):
                self._sums[part].add(token_logp, token_entropy, is_correct)
            improbable |= token_logp < math.log(0.1) and not where & {"format", "end_of_turn"}
        self._rows += 1
        self._rows_below_01 += improbable

    def add_row_without_tokens(self) -> None:
        self._rows += 1

    def evidence(self) -> tuple[tuple[PartEvidence, ...], RowEvidence]:
        """Of every part, parts without tokens too."""
        rows = RowEvidence(
            num_rows=self._rows,
            p_below_01_count=self._rows_below_01,
            share_p_below_01=self._rows_below_01 / self._rows if self._rows else None,
        )
        return tuple(self._sums[part].evidence(part) for part in PARTS), rows
