"""Which objective follows from what a preflight counted, with reasons in words. Torch-free, pure.

The rule and its bounds were chosen from trainings of every objective on tasks with known outcomes:
benchmarks/calibration/README.md has the figures, and what they cannot tell. Knows nothing about models or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

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


def decide(parts: Sequence[PartEvidence], rows: RowEvidence) -> Verdict:
    """The verdict; parts has every part once."""
    return _Decision({part.part: part for part in parts}, rows).verdict()


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

    def verdict(self) -> Verdict:
        if self.new_content >= ALL_NEW:
            objective, label, reasons = self._new_content()
        elif self.format_p is not None and self.format_p < NEW_FORMAT:
            objective, label, reasons = self._new_format()
        elif self.new_content >= NEW_CONTENT:
            objective, label, reasons = self._new_content()
        elif self.digits_p is not None and self.digits_p < WEAK_DIGITS:
            objective, label, reasons = self._weak()
        elif self.end_p is not None and self.end_p < NEW_FORMAT:
            objective, label, reasons = self._new_end()
        elif self.new_content < NO_NOISE:
            objective, label, reasons = self._no_noise()
        else:
            objective, label, reasons = self._known_content()
        return Verdict(
            objective=objective,
            label=label,
            reasons=tuple(reasons),
            evidence=self._evidence(),
            would_change=tuple(self._would_change()),
            limits=LIMITS,
            rule=RULE,
        )

    def _new_format(self) -> tuple[ObjectiveConfig, str, list[str]]:
        discards = self.parts["format"].dft_discards or 0.0
        reasons = [
            f"The model gives the tags of your answers a probability of {self.format_p:.3f} on average: plain DFT "
            f"would discard {discards:.0%} of their gradient and may never learn to write them. A floor of {FLOOR:g} "
            "keeps them learnable, and still weighs what the model finds unlikely ten times less than SFT does.",
            "What stands between tags that the model does not know looks less probable than it is: run the preflight "
            "again on a model that has learned the tags, to see whether the content is new too; then SFT is better.",
        ]
        return ObjectiveConfig(name="dft", weight_floor=FLOOR), f"dft with weight_floor {FLOOR:g}", reasons

    def _new_content(self) -> tuple[ObjectiveConfig, str, list[str]]:
        reasons = [
            f"The model gives {self.new_content:.0%} of your words ({self.improbable_words} of {self.num_words}) a "
            f"probability below 0.1: to it they are new, and DFT would discard "
            f"{self.parts['all'].dft_discards or 0.0:.0%} of the gradient, that of just these words. SFT learns them.",
        ]
        return ObjectiveConfig(name="nll"), "nll (SFT)", reasons

    def _known_content(self) -> tuple[ObjectiveConfig, str, list[str]]:
        everything = self.parts["all"]
        reasons = [
            f"The model gives only {self.new_content:.1%} of your words ({self.improbable_words} of "
            f"{self.num_words}) a probability below 0.1: it can do most of this already. Such few improbable words are "
            "more often noise than knowledge, and DFT leaves them where SFT learns them by heart.",
            f"DFT would discard {everything.dft_discards or 0.0:.0%} of the gradient.",
        ]
        return ObjectiveConfig(name="dft"), "dft", reasons

    def _no_noise(self) -> tuple[ObjectiveConfig, str, list[str]]:
        reasons = [
            f"The model gives hardly any of your words ({self.improbable_words} of {self.num_words}) a probability "
            "below 0.1: there is nothing for DFT to leave out, and of what the model half knows SFT learns more. "
            "What it is sure of already, neither changes much.",
        ]
        return ObjectiveConfig(name="nll"), "nll (SFT)", reasons

    def _weak(self) -> tuple[ObjectiveConfig, str, list[str]]:
        reasons = [
            f"The model writes much as your data does, but gives its digits a probability of {self.digits_p:.2f} on "
            "average: it has begun to know this, and is not good at it. Plain DFT would hold on to what it gets wrong; "
            f"the weight p^{ALPHA:g} learns about as freely as SFT does.",
        ]
        return ObjectiveConfig(name="power", alpha=ALPHA), f"power with alpha {ALPHA:g}", reasons

    def _new_end(self) -> tuple[ObjectiveConfig, str, list[str]]:
        reasons = [
            f"The model can do most of this already ({self.new_content:.1%} of your words have a probability below "
            f"0.1), but gives the end of turn a probability of {self.end_p:.4f}: with plain DFT it may never stop. The "
            f"weight p^{ALPHA:g} learns to stop, and still less of what is likely noise than SFT does.",
            "Watch eos_nll in the metrics: if it does not fall, take dft with a weight_floor of 0.1, or SFT.",
        ]
        return ObjectiveConfig(name="power", alpha=ALPHA), f"power with alpha {ALPHA:g}", reasons

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

    def _would_change(self) -> list[str]:
        if self.new_content < ALL_NEW and self.format_p is not None and self.format_p < NEW_FORMAT:
            return [
                f"tags that the model writes with a probability of {NEW_FORMAT:g} or more (now {self.format_p:.3f}): "
                "fewer new tags, or a model that has seen them; the words then decide"
            ]
        now = f"words with a probability below 0.1 (now {self.new_content:.1%})"
        if self.new_content >= NEW_CONTENT:
            return [f"less than {NEW_CONTENT:.0%} of {now}, because the model knows the subject: then dft"]
        changes = [f"{NEW_CONTENT:.0%} or more of {now}, because the data is new to the model: then nll"]
        if self.new_content < NO_NOISE:
            changes = [f"{NO_NOISE:.0%} to {NEW_CONTENT:.0%} of {now}, because some demonstrations are wrong: then dft"]
        if self.digits_p is not None:
            above = self.digits_p >= WEAK_DIGITS
            changes.append(
                f"digits with a mean probability {'below' if above else 'of at least'} {WEAK_DIGITS:g} (now "
                f"{self.digits_p:.2f}): then {f'power with alpha {ALPHA:g}' if above else 'dft'}"
            )
        if self.end_p is not None:
            above = self.end_p >= NEW_FORMAT
            changes.append(
                f"an end of turn with a probability {'below' if above else 'of at least'} {NEW_FORMAT:g} (now "
                f"{self.end_p:.3f}): then {f'power with alpha {ALPHA:g}' if above else 'dft'}"
            )
        return changes
