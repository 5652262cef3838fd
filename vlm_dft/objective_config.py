"""Which objective a run trains with, and its options: names and limits. Torch-free.

The weights themselves are ``vlm_dft.objectives``, with every formula and its source.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, Self, get_args

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from vlm_dft.frozen import Frozen

Objective = Literal[
    "nll",
    "dft",
    "dft_nll",
    "power",
    "threshold",
    "deft",
    "deft_cayley",
    "eaft",
    "sentence",
    "geometric_mean",
    "asft",
    "iw_sft",
    "iw_sft_token",
    "psft",
]

OBJECTIVE_OPTIONS: Final[dict[Objective, tuple[str, ...]]] = {
    **dict.fromkeys(get_args(Objective), ()),
    "dft": ("weight_floor", "weight_cap"),
    "dft_nll": ("nll_share",),
    "power": ("alpha",),
    "threshold": ("kind", "probability"),
    "eaft": ("alpha",),
    "asft": ("kl_weight",),
    "iw_sft": ("temperature", "weight_cap"),
    "psft": ("clip_ratio_high",),
}
"""Which fields of ObjectiveConfig mean something for which objective."""

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Exponent = Annotated[float, Field(gt=0.0, le=10.0)]
Coefficient = Annotated[float, Field(ge=0.0, le=100.0)]
WeightCap = Annotated[float | None, Field(gt=0.0, le=1000.0)]
ThresholdKind = Literal["top_p", "bottom_p", "top_logp", "bottom_logp"]


class ObjectiveConfig(Frozen):
    """Loss: weight x (-log p) summed over supervised tokens, divided by their number in the global batch.

    ``vlm_dft.objectives`` has each objective's formula and source. An option of another objective is refused.
    """

    name: Objective = "nll"
    """nll: weight 1, plain SFT. dft: weight p, detached (arXiv 2508.05629)."""
    weight_floor: Share = 0.0
    """dft: smallest weight of a token; 0 is the paper's objective, about 0.1 keeps rare tokens learnable."""
    weight_cap: WeightCap = None
    """dft, iw_sft: largest weight of a token; None: the objective's own (dft 1, iw_sft 16)."""
    nll_share: Share = 0.1
    """dft_nll: share of plain NLL in the weight: 0 is dft, 1 is nll."""
    alpha: Exponent = 1.0
    """power: the exponent of p (1 is dft, towards 0 nll). eaft: the exponent of the normalised entropy."""
    kind: ThresholdKind = "top_p"
    """threshold: which tokens count, and whether dft or plain NLL is taken of them."""
    probability: Share = 0.5
    """threshold: tokens at or above it (top_...), at or below it (bottom_...) count."""
    kl_weight: Coefficient = 0.05
    """asft: coefficient of KL(reference || model)."""
    temperature: Coefficient = 2.0
    """iw_sft: multiplies the sequence's mean log-ratio to the reference."""
    clip_ratio_high: Coefficient = 0.28
    """psft: tokens whose probability has grown by more than this share get no gradient."""

    @model_validator(mode="after")
    def _options_belong_to_the_objective(self) -> Self:
        known = OBJECTIVE_OPTIONS[self.name]
        for option, field in type(self).model_fields.items():
            if option != "name" and option not in known and getattr(self, option) != field.default:
                owners = " and ".join(name for name, options in OBJECTIVE_OPTIONS.items() if option in options)
                listed = f"its options are {', '.join(known)}" if known else "it has no options"
                raise ValueError(f"{option} applies to the objective {owners}, not to {self.name}: {listed}")
        if self.name == "dft" and self.weight_cap is not None and self.weight_cap < self.weight_floor:
            raise ValueError(f"weight_cap {self.weight_cap} is below weight_floor {self.weight_floor}")
        return self

    @model_serializer(mode="wrap")
    def _without_options_of_others(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # weight_floor is always there, and None is not: so a run of nll or dft looks as it always did.
        kept = {"name", "weight_floor", *OBJECTIVE_OPTIONS[self.name]}
        return {key: value for key, value in serialize(self).items() if key in kept and value is not None}

    @property
    def options(self) -> dict[str, Any]:
        """The options of this objective alone."""
        return {option: getattr(self, option) for option in OBJECTIVE_OPTIONS[self.name]}
