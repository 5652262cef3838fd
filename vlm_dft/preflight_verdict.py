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

RULE: Final = "preflight-rules/v2"
NEW_CONTENT: Final = 0.15
"""Share of the words with p < 0.1 from which nll was better; below it dft was better or as good."""
NEW_FORMAT: Final = 0.1
"""Mean p of tags, or of the end of turn, below which dft did not learn to write them in every seed."""
ALL_NEW: Final = 0.75
"""The same share from which nll was better whatever the tags are: to such a model everything is new."""
NOISE: Final = 0.5
"""Share of the words' gradient mass in words with p < 0.1 from which dft was better, as these few are what it leaves
out. Below it the model half knows what it does not know, and nll was as good or better: it learns that faster."""
FLOOR: Final = 0.1
ALPHA: Final = 0.5
LIMITS: Final = (
    "The rule was found by training text models of 0.1 million parameters on generated tasks, for tens of epochs on "
    "hundreds of rows: the bounds may lie elsewhere for a large model, for pictures, and for a single epoch.",
    "It looks at the model before the training. Whether improbable words are wrong or new it cannot see: few of them "
    "are taken for noise, many for new knowledge.",
)


Finding = Literal["new_content", "new_format", "half_known", "new_end", "known_content"]
_SFT: Final = (ObjectiveConfig(name="nll"), "nll (SFT)")
_ADVICE: Final[dict[Finding, tuple[ObjectiveConfig, str]]] = {
    "new_content": _SFT,
    "new_format": (ObjectiveConfig(name="dft", weight_floor=FLOOR), f"dft with weight_floor {FLOOR:g}"),
    "half_known": _SFT,
    "new_end": (ObjectiveConfig(name="power", alpha=ALPHA), f"power with alpha {ALPHA:g}"),
    "known_content": (ObjectiveConfig(name="dft"), "dft"),
}


def decide(parts: Sequence[PartEvidence], rows: RowEvidence) -> Verdict:
    """The verdict; parts has every part once."""
    return _Decision({part.part: part for part in parts}, rows).verdict()


@dataclass(frozen=True)
class _Looks:
    """What the rule decides by; None: there are no such tokens."""

    new_content: float
    """Share of the words with p < 0.1."""
    noise: float
    """Share of the words' gradient mass that is theirs."""
    format_p: float | None
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
        if self.noise < NOISE:
            return "half_known"
        return "new_end" if self.end_p is not None and self.end_p < NEW_FORMAT else "known_content"

    @property
    def label(self) -> str:
        return _ADVICE[self.finding()][1]


class _Decision:
    def __init__(self, parts: dict[Part, PartEvidence], rows: RowEvidence) -> None:
        self.parts, self.rows = parts, rows
        words = [parts["reasoning"], parts["answer"]]
        self.num_words = sum(part.num_tokens for part in words)
        self.improbable_words = sum(part.p_below_01_count for part in words)
        # Each of them has a mass of 0.9 to 1, and is counted as 1.
        mass = sum(part.gradient_mass for part in words)
        self.looks = _Looks(
            new_content=self.improbable_words / self.num_words if self.num_words else 0.0,
            noise=min(1.0, self.improbable_words / mass) if mass else 0.0,
            format_p=parts["format"].mean_p,
            end_p=parts["end_of_turn"].mean_p,
        )

    def verdict(self) -> Verdict:
        finding = self.looks.finding()
        objective, label = _ADVICE[finding]
        reasons: dict[Finding, Callable[[], list[str]]] = {
            "new_content": self._new_content,
            "new_format": self._new_format,
            "half_known": self._half_known,
            "new_end": self._new_end,
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
            f"The model gives the tags of your answers a probability of {self.looks.format_p:.3f} on average: plain "
            f"DFT would discard {discards:.0%} of their gradient and may never learn to write them. A floor of "
            f"{FLOOR:g} keeps them learnable, and still weighs what the model finds unlikely ten times less than SFT "
            "does.",
            "What stands between tags that the model does not know looks less probable than it is: run the preflight "
            "again on a model that has learned the tags, to see whether the content is new too; then SFT is better.",
        ]

    def _new_content(self) -> list[str]:
        return [
            f"The model gives {self.looks.new_content:.0%} of your words ({self.improbable_words} of {self.num_words}) "
            f"a probability below 0.1: to it they are new, and DFT would discard "
            f"{self.parts['all'].dft_discards or 0.0:.0%} of the gradient, most of it of these words. SFT learns them.",
        ]

    def _known_content(self) -> list[str]:
        everything = self.parts["all"]
        return [
            f"The model gives only {self.looks.new_content:.1%} of your words ({self.improbable_words} of "
            f"{self.num_words}) a probability below 0.1, and they make {self.looks.noise:.0%} of the words' gradient: "
            "it can do most of this already. Few words that pull so hard are more often noise than knowledge, and DFT "
            "leaves them where SFT learns them by heart.",
            f"DFT would discard {everything.dft_discards or 0.0:.0%} of the gradient.",
        ]

    def _half_known(self) -> list[str]:
        return [
            f"Words with a probability below 0.1 ({self.improbable_words} of {self.num_words}) make only "
            f"{self.looks.noise:.0%} of the words' gradient: DFT has little to leave out there. The rest is what the "
            "model half knows, and SFT learns more of that; what it is sure of already, neither changes much.",
        ]

    def _new_end(self) -> list[str]:
        return [
            f"The model can do most of this already ({self.looks.new_content:.1%} of your words have a probability "
            f"below 0.1), but gives the end of turn a probability of {self.looks.end_p:.4f}: with plain DFT it may "
            f"never stop. The weight p^{ALPHA:g} learns to stop, and still less of what is likely noise than SFT does.",
            "Watch eos_nll in the metrics: if it does not fall, take dft with a weight_floor of 0.1, or SFT.",
        ]

    def _evidence(self) -> dict[str, float]:
        everything = self.parts["all"]
        found = {
            "share_of_words_p_below_01": self.looks.new_content,
            "share_of_gradient_p_below_01": self.looks.noise,
            "mean_p": everything.mean_p,
            "share_p_below_001": everything.share_p_below_001,
            "share_p_below_01": everything.share_p_below_01,
            "dft_discards": everything.dft_discards,
            "format_mean_p": self.looks.format_p,
            "end_of_turn_mean_p": self.looks.end_p,
            "digits_mean_p": self.parts["digits"].mean_p,
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
        now = f"words with a probability below 0.1 (now {self.looks.new_content:.1%})"
        bound = ALL_NEW if self.looks.has_new_format else NEW_CONTENT
        if self.looks.new_content >= bound:
            change = f"less than {bound:.0%} of {now}, because the model knows the subject"
            yield change, {"new_content": math.nextafter(bound, 0)}
        else:
            yield f"{bound:.0%} or more of {now}, because the data is new to the model", {"new_content": bound}
        share = f"of the words' gradient in words with a probability below 0.1 (now {self.looks.noise:.0%})"
        if self.looks.noise < NOISE:
            yield f"{NOISE:.0%} or more {share}, because some demonstrations are wrong", {"noise": NOISE}
        else:
            yield f"less than {NOISE:.0%} {share}, because the model half knows the subject", {"noise": 0.0}
        for name, what in (("format_p", "tags"), ("end_p", "an end of turn")):
            p = getattr(self.looks, name)
            if p is not None:
                is_above = p >= NEW_FORMAT
                change = f"{what} with a mean probability {'below' if is_above else 'of at least'} {NEW_FORMAT:g}"
                yield f"{change} (now {p:.3f})", {name: 0.0 if is_above else NEW_FORMAT}
