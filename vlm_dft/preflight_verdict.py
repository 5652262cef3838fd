"""Which objective follows from what a preflight counted, with reasons in words. Torch-free, pure.

The rule and its two bounds were chosen from trainings of every objective on tasks with known outcomes:
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
"""Mean p of tags below which dft never learned to write them."""
FLOOR: Final = 0.1
LIMITS: Final = (
    "The rule was found by training text models of 0.1 million parameters on generated tasks, for tens of epochs on "
    "hundreds of rows: the bounds may lie elsewhere for a large model, for pictures, and for a single epoch.",
    "It looks at the model before the training. Whether improbable words are wrong or new it cannot see: few of them "
    "are taken for noise, many for new knowledge.",
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

    def verdict(self) -> Verdict:
        if self.format_p is not None and self.format_p < NEW_FORMAT:
            objective, label, reasons = self._new_format()
        elif self.new_content >= NEW_CONTENT:
            objective, label, reasons = self._new_content()
        else:
            objective, label, reasons = self._known_content()
        return Verdict(
            objective=objective,
            label=label,
            reasons=(*reasons, *self._end_of_turn(objective)),
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

    def _end_of_turn(self, objective: ObjectiveConfig) -> list[str]:
        if self.end_p is None or self.end_p >= NEW_FORMAT:
            return []
        if objective.name == "nll" or objective.weight_floor:
            return [f"The end of turn has a probability of {self.end_p:.3f}: this objective learns it all the same."]
        return [
            f"The end of turn has a probability of {self.end_p:.3f}: plain DFT learns it late. Watch eos_nll in the "
            f"metrics; a weight_floor of {FLOOR:g} makes sure of it, at the price of learning more of the noise."
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
            "digits_share_p_below_01": self.parts["digits"].share_p_below_01,
            "share_of_rows_p_below_01": self.rows.share_p_below_01,
        }
        return {name: value for name, value in found.items() if value is not None}

    def _would_change(self) -> list[str]:
        known = self.format_p is None or self.format_p >= NEW_FORMAT
        changes = []
        if not known:
            changes.append(
                f"tags that the model writes with a probability of {NEW_FORMAT:g} or more (now {self.format_p:.3f}): "
                "fewer new tags, or a model that has seen them; the words then decide"
            )
        above = self.new_content >= NEW_CONTENT
        if known:
            changes.append(
                f"{'less' if above else 'more'} than {NEW_CONTENT:.0%} of words with a probability below 0.1 (now "
                f"{self.new_content:.1%}): "
                + ("a model that knows the subject: then dft" if above else "data that is new to the model: then nll")
            )
        return changes
