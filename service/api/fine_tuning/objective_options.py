"""What a client may ask of an objective: one sub-object of ``method.supervised`` for each that has options.

Names, limits and defaults are the trainer's (``vlm_dft.objective_config``), whose formulas and sources are
``vlm_dft.objectives``'s; a test compares the two lists.
"""

from __future__ import annotations

from typing import Any, Final, Literal

from pydantic import ValidationError

from service.api.schemas import RequestModel
from vlm_dft.objective_config import (
    OBJECTIVE_OPTIONS,
    Coefficient,
    Exponent,
    Objective,
    ObjectiveConfig,
    Share,
    ThresholdKind,
    WeightCap,
)

ObjectiveName = Literal["nll", "sft", Objective]
"""Those there are, and sft, an alias of nll."""

SUMMARIES: Final[dict[Objective, str]] = {
    "nll": "plain SFT, every token counts alike",
    "dft": "the paper's, each token counts by its own probability p",
    "dft_nll": "DFT blended with SFT",
    "power": "weight p^alpha, between SFT and DFT or beyond",
    "threshold": "only tokens on one side of a probability count",
    "deft": "DFT where the model is sure, SFT where it is not",
    "deft_cayley": "DEFT by the token's p and its answer's mean p",
    "eaft": "weight by the entropy of the prediction",
    "sentence": "weight by the probability of the whole answer",
    "geometric_mean": "weight by the answer's geometric mean of p",
    "asft": "DFT anchored to the base model by KL",
    "iw_sft": "weight by how much likelier the answer has become",
    "iw_sft_token": "the same, token by token",
    "psft": "the ratio to the base model, clipped as PPO clips it",
}
"""Each in a few words, in the order in which lists show them; the formulas are the trainer's."""


class DftOptions(RequestModel):
    """Options of the objective dft."""

    weight_floor: Share = 0.0
    """Smallest weight a token can get; 0 is the paper's objective, about 0.1 keeps rare tokens learnable."""
    weight_cap: WeightCap = None
    """Largest weight a token can get; null: 1, the largest probability."""


class DftNllOptions(RequestModel):
    """Options of dft_nll, dft blended with plain NLL."""

    nll_share: Share = 0.1
    """0 is dft, 1 is nll."""


class PowerOptions(RequestModel):
    """Options of power, whose weight is p^alpha."""

    alpha: Exponent = 1.0
    """1 is dft, towards 0 nll."""


class ThresholdOptions(RequestModel):
    """Options of threshold, which takes the tokens on one side of a probability."""

    kind: ThresholdKind = "top_p"
    """top_..., bottom_...: which side counts. ..._p: weight p; ..._logp: weight 1."""
    probability: Share = 0.5
    """Where the sides meet."""


class EaftOptions(RequestModel):
    """Options of eaft, whose weight is a normalised entropy."""

    alpha: Exponent = 1.0
    """Its exponent."""


class AsftOptions(RequestModel):
    """Options of asft, dft anchored to the base model."""

    kl_weight: Coefficient = 0.05
    """Coefficient of KL(base model || model) per token."""


class IwSftOptions(RequestModel):
    """Options of iw_sft, weighted by how much more probable an answer has become than it was to the base model."""

    temperature: Coefficient = 2.0
    """Multiplies the answer's mean log-ratio."""
    weight_cap: WeightCap = None
    """Largest weight; null: 16, the authors'."""


class PsftOptions(RequestModel):
    """Options of psft, the clipped ratio to the base model."""

    clip_ratio_high: Coefficient = 0.28
    """Tokens whose probability has grown by more than this share get no gradient."""


def objective_config(name: str, options: RequestModel | None) -> ObjectiveConfig:
    """The trainer's form. Raises ValueError for options that contradict each other."""
    name = "nll" if name == "sft" else name
    try:
        return ObjectiveConfig.model_validate({"name": name} | (options.model_dump() if options else {}))
    except ValidationError as error:
        raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None


def shown_options(objective: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The sub-object of a stored objective as a request would have it; none for an objective without options."""
    known = OBJECTIVE_OPTIONS.get(objective["name"], ())
    if not known:
        return {}
    values = ObjectiveConfig(name=objective["name"]).options | objective
    return {objective["name"]: {option: values[option] for option in known if values[option] is not None}}
