"""Which objective follows from what a preflight counted, with reasons in words. Torch-free, pure.

The rule and its bounds were chosen from trainings of every objective on tasks with known outcomes:
benchmarks/calibration/README.md has the figures, and what they cannot tell. Knows nothing about models or files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from vlm_dft.objective_config import ObjectiveConfig
from vlm_dft.preflight_report import Part, PartEvidence, RowEvidence, Verdict

RULE: Final = "preflight-rules/v1"
NEW_CONTENT: Final = 0.15
"""Share of the words with p < 0.1 from which nll was better; below it dft was better or as good."""
NEW_FORMAT: Final = 0.1
"""Mean p of tags, or of the end of turn, below which dft did not learn to write them in every seed."""
ALL_NEW: Final = 0.75
"""The same share from which nll was better whatever the tags are: to such a model everything is new."""
WEAK_DIGITS: Final = 0.7
"""Mean p of digits below which the model cannot do the work yet, and dft was worse than nll. Digits, because wording
leaves them no choice."""
MIN_DIGITS: Final = 20
"""Fewer of them say nothing."""
NO_NOISE: Final = 0.01
"""The same share below which dft has nothing to leave out: it was as good as nll, or worse."""
FLOOR: Final = 0.1
ALPHA: Final = 0.5
LIMITS: Final = (
    "The rule was found by training text models of 0.1 million parameters on generated tasks, for tens of epochs on "
    "hundreds of rows: the bounds may lie elsewhere for a large model, for pictures, and for a single epoch.",
    "It looks at the model before the training. Whether improbable words are wrong or new it cannot see: few of them "
    "are taken for noise, many for new knowledge.",
    "Whether a model that has begun to know a subject is good at it yet is read from digits: of answers without digits "
    "it cannot say that.",
)


Finding = Literal["new_content", "new_format", "weak", "new_end", "no_noise", "known_content"]
_SFT: Final = (ObjectiveConfig(name="nll"), "nll (SFT)")
_POWER: Final = (ObjectiveConfig(name="power", alpha=ALPHA), f"power with alpha {ALPHA:g}")
_ADVICE: Final[dict[Finding, tuple[ObjectiveConfig, str]]] = {
    "new_content": _SFT,
    "new_format": (ObjectiveConfig(name="dft", weight_floor=FLOOR), f"dft with weight_floor {FLOOR:g}"),
    "weak": _POWER,
    "new_end": _POWER,
    "no_noise": _SFT,
    "known_content": (ObjectiveConfig(name="dft"), "dft"),
}


def decide(parts: Sequence[PartEvidence], rows: RowEvidence) -> Verdict:
    """The verdict; parts has every part once."""
    return _Decision({part.part: part for part in parts}, rows).verdict()


@dataclass(frozen=True)
class _Looks:
    """What the rule decides by; None: there are no such tokens, or too few."""

    new_content: float
    """Share of the words with p < 0.1."""
    format_p: float | None
    digits_p: float | None
    end_p: float | None

    @property
    def has_new_format(self) -> bool:
        return self.format_p is not None and self.format_p < NEW_FORMAT

    def finding(self) -> Finding:
        """The rule."""
        if self.new_content >= (ALL_NEW if self.has_new_format else NEW_CONTENT):
            return "new_content"
        if self.has_new_format:
            return "new_format"
        if self.digits_p is not None and self.digits_p < WEAK_DIGITS:
            return "weak"
        if self.end_p is not None and self.end_p < NEW_FORMAT:
            return "new_end"
        return "no_noise" if self.new_content < NO_NOISE else "known_content"

    @property
    def label(self) -> str:
        return _ADVICE[self.finding()][1]


class _Decision:
    def __init__(self, parts: dict[Part, PartEvidence], rows: RowEvidence) -> None:
        self.parts, self.rows = parts, rows
        words = [parts["reasoning"], parts["answer"]]
        self.num_words = sum(part.num_tokens for part in words)
        self.improbable_words = sum(part.p_below_01_count for part in words)
        self.new_content = self.improbable_words / self.num_words if self.num_words else 0.0
        self.format_p = parts["format"].mean_p
        self.end_p = parts["end_of_turn"].mean_p
        digits = parts["digits"]
        self.digits_p = digits.mean_p if digits.num_tokens >= MIN_DIGITS else None
        self.looks = _Looks(self.new_content, self.format_p, self.digits_p, self.end_p)

    def verdict(self) -> Verdict:
        finding = self.looks.finding()
        objective, label = _ADVICE[finding]
        reasons: dict[Finding, Callable[[], list[str]]] = {
            "new_content": self._new_content,
            "new_format": self._new_format,
            "weak": self._weak,
            "new_end": self._new_end,
            "no_noise": self._no_noise,
            "known_content": self._known_content,
        }
        return Verdict(
            objective=objective,
            label=label,
            reasons=tuple(reasons[finding]()),
            evidence=self._evidence(),
            would_change=tuple(self._would_change()),
            limits=LIMITS,
            rule=RULE,
        )

    def _new_format(self) -> list[str]:
        discards = self.parts["format"].dft_discards or 0.0
        return [
            f"The model gives the tags of your answers a probability of {self.format_p:.3f} on average: plain DFT "
            f"would discard {discards:.0%} of their gradient and may never learn to write them. A floor of {FLOOR:g} "
            "keeps them learnable, and still weighs what the model finds unlikely ten times less than SFT does.",
            "What stands between tags that the model does not know looks less probable than it is: run the preflight "
            "again on a model that has learned the tags, to see whether the content is new too; then SFT is better.",
        ]

    def _new_content(self) -> list[str]:
        return [
            f"The model gives {self.new_content:.0%} of your words ({self.improbable_words} of {self.num_words}) a "
            f"probability below 0.1: to it they are new, and DFT would discard "
            f"{self.parts['all'].dft_discards or 0.0:.0%} of the gradient, most of it of these words. SFT learns them.",
        ]

    def _known_content(self) -> list[str]:
        everything = self.parts["all"]
        return [
            f"The model gives only {self.new_content:.1%} of your words ({self.improbable_words} of "
            f"{self.num_words}) a probability below 0.1: it can do most of this already. Such few improbable words are "
            "more often noise than knowledge, and DFT leaves them where SFT learns them by heart.",
            f"DFT would discard {everything.dft_discards or 0.0:.0%} of the gradient.",
        ]

    def _no_noise(self) -> list[str]:
        return [
            f"The model gives hardly any of your words ({self.improbable_words} of {self.num_words}) a probability "
            "below 0.1: there is nothing for DFT to leave out, and of what the model half knows SFT learns more. "
            "What it is sure of already, neither changes much.",
        ]

    def _weak(self) -> list[str]:
        return [
            f"The model writes much as your data does, but gives its digits a probability of {self.digits_p:.2f} on "
            "average: it has begun to know this, and is not good at it. Plain DFT would hold on to what it gets wrong; "
            f"the weight p^{ALPHA:g} learns about as freely as SFT does.",
        ]

    def _new_end(self) -> list[str]:
        return [
            f"The model can do most of this already ({self.new_content:.1%} of your words have a probability below "
            f"0.1), but gives the end of turn a probability of {self.end_p:.4f}: with plain DFT it may never stop. The "
            f"weight p^{ALPHA:g} learns to stop, and still less of what is likely noise than SFT does.",
            "Watch eos_nll in the metrics: if it does not fall, take dft with a weight_floor of 0.1, or SFT.",
        ]

    def _evidence(self) -> dict[str, float]:
        everything = self.parts["all"]
        found = {
            "share_of_words_p_below_01": self.new_content,
            "mean_p": everything.mean_p,
            "share_p_below_001": everything.share_p_below_001,
            "share_p_below_01": everything.share_p_below_01,
            "dft_discards": everything.dft_discards,
            "format_mean_p": self.format_p,
            "end_of_turn_mean_p": self.end_p,
            "digits_mean_p": self.digits_p,
            "share_of_rows_p_below_01": self.rows.share_p_below_01,
        }
        return {name: value for name, value in found.items() if value is not None}

    def _would_change(self) -> Iterator[str]:
        """Each change alone, where it would lead to another verdict."""
        for change, values in self._changes():
            label = replace(self.looks, **values).label
            if label != self.looks.label:
                yield f"{change}: then {label}"

    def _changes(self) -> Iterator[tuple[str, dict[str, float]]]:
        now = f"words with a probability below 0.1 (now {self.new_content:.1%})"
        bound = ALL_NEW if self.looks.has_new_format else NEW_CONTENT
        if self.new_content >= bound:
            change = f"less than {bound:.0%} of {now}, because the model knows the subject"
            yield change, {"new_content": math.nextafter(bound, 0)}
        else:
            yield f"{bound:.0%} or more of {now}, because the data is new to the model", {"new_content": bound}
        if self.new_content < NO_NOISE:
            change = f"{NO_NOISE:.0%} to {NEW_CONTENT:.0%} of {now}, because some demonstrations are wrong"
            yield change, {"new_content": NO_NOISE}
        for name, what, bound in (
            ("format_p", "tags", NEW_FORMAT),
            ("digits_p", "digits", WEAK_DIGITS),
            ("end_p", "an end of turn", NEW_FORMAT),
        ):
            p = getattr(self.looks, name)
            if p is not None:
                is_above = p >= bound
                change = f"{what} with a mean probability {'below' if is_above else 'of at least'} {bound:g}"
                yield f"{change} (now {p:.3f})", {name: 0.0 if is_above else bound}
