"""What a preflight found: evidence by part of the answer, and a verdict with its reasons. Torch-free.

Sums and counts are kept beside every share, so that a reader can check. Knows nothing about how they were made
(``vlm_dft.preflight``) or what follows from them (``vlm_dft.preflight_verdict``).
"""

from __future__ import annotations

from typing import Final, Literal

from vlm_dft.frozen import Frozen
from vlm_dft.objective_config import ObjectiveConfig

NUM_BINS: Final = 20
Part = Literal["all", "reasoning", "answer", "digits", "format", "end_of_turn"]
PARTS: Final[tuple[Part, ...]] = ("all", "reasoning", "answer", "digits", "format", "end_of_turn")


class PartEvidence(Frozen):
    """The supervised tokens of one part. reasoning, answer, format and end_of_turn share all of them among each other;
    digits are those of reasoning and answer that hold a digit. Shares and means are null where there is no token."""

    part: Part
    """reasoning: between <think> and </think>. answer: every other word. format: tags such as <answer>."""
    num_tokens: int
    counts: tuple[int, ...]
    """Tokens whose probability lies in the first, second, ... of 20 equal shares of 0..1."""
    p_sum: float
    nll_sum: float
    entropy_sum: float
    correct_count: int
    """Tokens that are the arg-max."""
    p_below_001_count: int
    p_below_01_count: int
    gradient_mass: float
    """Sum of 1 - p: half the L1 norm of the NLL's gradient with respect to the logits, token by token."""
    dft_gradient_mass: float
    """The same for DFT: sum of p (1 - p)."""
    mean_p: float | None
    nll: float | None
    entropy: float | None
    """Mean entropy of the predicted distribution in nats."""
    accuracy: float | None
    share_p_below_001: float | None
    share_p_below_01: float | None
    dft_discards: float | None
    """Share of the gradient mass that DFT's weights take away: 1 - dft_gradient_mass / gradient_mass."""


class RowEvidence(Frozen):
    """How many rows hold a token, tags and end of turn apart, that the model thinks improbable."""

    num_rows: int
    p_below_01_count: int
    """Rows with at least one such token of p < 0.1."""
    share_p_below_01: float | None


class Verdict(Frozen):
    """Which objective to train with, and why."""

    objective: ObjectiveConfig
    """nll, dft, power with an alpha, or dft with a weight_floor: as method.supervised takes it."""
    label: str
    """The same in words, such as "dft with weight_floor 0.1"."""
    reasons: tuple[str, ...]
    """In words, the decisive one first."""
    evidence: dict[str, float]
    """The figures that decided."""
    would_change: tuple[str, ...]
    """What would lead to another verdict."""
    limits: tuple[str, ...]
    """What the rule was found on, and what it therefore cannot know."""
    rule: str
    """Name and version of the rule; verdicts of different rules do not compare."""


class PreflightReport(Frozen):
    """What a preflight found."""

    num_rows: int
    """Rows looked at."""
    num_rows_total: int
    """Rows of the dataset."""
    num_rows_too_long: int
    """Rows of the dataset above max_length_tokens, which no sample can hold."""
    parts: tuple[PartEvidence, ...]
    rows: RowEvidence
    verdict: Verdict
    data_fingerprint: str
    device: str
    precision: str
    wall_seconds: float
    """Loading excluded."""
