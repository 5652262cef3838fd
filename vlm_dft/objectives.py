"""The objectives: name -> the weight that each supervised token's NLL gets.

Every objective is  L = (sum_n w_n * (-log p_n) + k * sum_n KL_n) / N  with w_n detached and N the supervised tokens of
the global batch, the same N for all of them. An objective decides w and, where it is anchored to a reference model, k.
Authors often write another loss with the same gradient, such as (1 - p^a) / a for w = p^a: ours has theirs, and the
loss that is reported is always weight x NLL. Adding an objective is one function here.

Sequences (``segments_N``) are whole answers: all supervised tokens of one sample. Where authors average over a
micro-batch we average over the sequence, so that no way of cutting a batch changes a gradient.
Left out because no formula could be read: TALR (arXiv 2509.20758) and CADFT (arXiv 2606.11206).
Knows nothing about hidden states, heads or batches; ``vlm_dft.head`` computes the statistics and applies the weights.

Shapes: N supervised tokens, K sequences.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, get_type_hints

import torch
from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from torch import Tensor

from vlm_dft.errors import ConfigError
from vlm_dft.objective_config import Coefficient, Exponent, ObjectiveConfig, Share, ThresholdKind, WeightCap

TOP_K: Final = 20
"""How many of the largest probabilities top_entropy_N looks at."""
_LARGEST_LOG_RATIO: Final = 20.0


@dataclass(frozen=True)
class TokenStatistics:
    """What the model predicts at each supervised token, float32 or wider, without a graph.

    A statistic that the objective did not declare may be None: the head computes only what was asked for.
    """

    logp_N: Tensor
    """Log-probability of the target."""
    entropy_N: Tensor | None = None
    """Entropy of the predicted distribution in nats."""
    top_entropy_N: Tensor | None = None
    """The same of the TOP_K largest probabilities, renormalised."""
    sum_p2_N: Tensor | None = None
    """Sum of squared probabilities: 1 for a sure prediction, 1/V for a flat one."""
    ref_logp_N: Tensor | None = None
    """Log-probability of the target under the reference model."""
    segments_N: Tensor | None = None
    """Which sequence a token belongs to, 0..K-1. With it, N is all tokens of these sequences at once."""

    @property
    def p_N(self) -> Tensor:  # noqa: N802  shapes are suffixes
        """Probability of the target."""
        return self.logp_N.exp()

    def segment_sum(self, values_N: Tensor) -> Tensor:
        """Sum over the token's sequence, at every token."""
        segments_N = _given(self.segments_N)
        # float64, so that the order in which a device adds cannot be seen in float32
        sums_K = torch.zeros(int(segments_N.max()) + 1, dtype=torch.float64, device=values_N.device)
        return sums_K.index_add_(0, segments_N, values_N.double())[segments_N].to(values_N.dtype)

    def segment_mean(self, values_N: Tensor) -> Tensor:
        """Mean over the token's sequence, at every token."""
        return self.segment_sum(values_N) / self.segment_sum(torch.ones_like(values_N))

    def log_ratio_N(self) -> Tensor:  # noqa: N802
        """log p - log p of the reference."""
        return self.logp_N - _given(self.ref_logp_N)


WeightFn = Callable[..., Tensor]


@dataclass(frozen=True)
class Objective:
    """One objective with its options filled in."""

    name: str
    weight_fn: Callable[[TokenStatistics], Tensor]
    """TokenStatistics -> weights of shape N."""
    needs: frozenset[str] = frozenset()
    """Optional fields of TokenStatistics that weight_fn reads."""
    kl_weight: float = 0.0
    """Coefficient of KL(reference || model) per token, over the whole vocabulary; 0: no reference is needed."""
    vanishing: bool = False
    """No weight exceeds p, so that flat predictions get next to no gradient: the head may leave columns out."""

    def weights(self, statistics: TokenStatistics) -> Tensor:
        """Detached weights of shape N: no gradient flows through them, whatever weight_fn does."""
        with torch.no_grad():
            return self.weight_fn(statistics)

    @property
    def needs_segments(self) -> bool:
        """Weights depend on whole sequences: the head needs segments_N and all of a sequence's tokens in one call."""
        return "segments_N" in self.needs

    @property
    def needs_ref_logp(self) -> bool:
        """The head needs the target's log-probability under a reference model, ref_logp_N."""
        return "ref_logp_N" in self.needs

    @property
    def needs_reference(self) -> bool:
        """The head needs a reference model's hidden states and head."""
        return self.kl_weight > 0


@dataclass(frozen=True)
class _Entry:
    weight_fn: WeightFn
    needs: frozenset[str]
    vanishing: bool | Callable[[dict[str, Any]], bool]
    anchored: bool
    options: type[BaseModel]


_REGISTRY: Final[dict[str, _Entry]] = {}


def register(
    *needs: str, vanishing: bool | Callable[[dict[str, Any]], bool] = False, anchored: bool = False
) -> Callable[[WeightFn], WeightFn]:
    """Enter a weight function under its own name; its keyword-only arguments, with their types, are its options.

    vanishing: no weight exceeds p, always or with some options. anchored: the option kl_weight is the anchor's.
    """

    def enter(weight_fn: WeightFn) -> WeightFn:
        hints = get_type_hints(weight_fn, include_extras=True)
        fields: dict[str, Any] = {
            parameter.name: (hints.get(parameter.name, Any), parameter.default)
            for parameter in inspect.signature(weight_fn).parameters.values()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        }
        strict = ConfigDict(extra="forbid", allow_inf_nan=False)
        options = create_model(f"{weight_fn.__name__}_options", __config__=strict, **fields)
        _REGISTRY[weight_fn.__name__] = _Entry(weight_fn, frozenset(needs), vanishing, anchored, options)
        return weight_fn

    return enter


def names() -> list[str]:
    """The objectives there are."""
    return sorted(_REGISTRY)


def options_of(name: str) -> list[str]:
    """Names of an objective's options."""
    return list(_REGISTRY[name].options.model_fields)


def objective(name: str, **options: Any) -> Objective:
    """Look an objective up and fill its options in. Raises ConfigError that lists what there is."""
    if name not in _REGISTRY:
        raise ConfigError(f"unknown objective {name!r}: there are {', '.join(names())}", param="objective.name")
    entry = _REGISTRY[name]
    known = options_of(name)
    for option in options:
        if option not in known:
            listed = f"its options are {', '.join(known)}" if known else "it has no options"
            raise ConfigError(f"objective {name} does not know {option!r}: {listed}", param=f"objective.{option}")
    try:
        filled = dict(entry.options.model_validate(options))
    except ValidationError as error:
        first = error.errors()[0]
        option = first["loc"][0]
        raise ConfigError(
            f"objective {name}: {option} is {first['input']!r}: {first['msg']}", param=f"objective.{option}"
        ) from error
    return Objective(
        name,
        partial(entry.weight_fn, **filled),
        entry.needs,
        kl_weight=filled["kl_weight"] if entry.anchored else 0.0,
        vanishing=entry.vanishing(filled) if callable(entry.vanishing) else entry.vanishing,
    )


def from_config(config: ObjectiveConfig) -> Objective:
    """The objective of a run."""
    return objective(config.name, **config.options)


def _given(statistic_N: Tensor | None) -> Tensor:
    assert statistic_N is not None, "an objective reads a statistic that it did not declare"
    return statistic_N


@register()
def nll(statistics: TokenStatistics) -> Tensor:
    """w = 1: plain supervised fine-tuning."""
    return torch.ones_like(statistics.logp_N)


@register(vanishing=lambda options: options["weight_floor"] == 0)
def dft(statistics: TokenStatistics, *, weight_floor: Share = 0.0, weight_cap: WeightCap = None) -> Tensor:
    """w = p within [weight_floor, weight_cap]: Dynamic Fine-Tuning (arXiv 2508.05629), whose gradient is that of -p.

    A floor keeps rare tokens, the end of turn above all, learnable.
    """
    return statistics.p_N.clamp(min=weight_floor, max=weight_cap)


@register()
def dft_nll(statistics: TokenStatistics, *, nll_share: Share = 0.1) -> Tensor:
    """w = (1 - c) p + c, with c = nll_share: DFT blended with plain NLL."""
    return (1 - nll_share) * statistics.p_N + nll_share


@register(vanishing=lambda options: options["alpha"] >= 1)
def power(statistics: TokenStatistics, *, alpha: Exponent = 1.0) -> Tensor:
    """w = p^alpha, the gradient of (1 - p^alpha) / alpha; 1 is dft, towards 0 nll.

    Beyond Log Likelihood, arXiv 2510.00526; "GeneralFamily" in the authors' trainer (GaotangLi/Beyond-Log-Likelihood).
    """
    return (alpha * statistics.logp_N).exp()


@register(vanishing=lambda options: options["kind"] in ("top_p", "bottom_p"))
def threshold(statistics: TokenStatistics, *, kind: ThresholdKind = "top_p", probability: Share = 0.5) -> Tensor:
    """top_p: p where p >= probability, else 0. bottom_p: p where p <= probability. top_logp, bottom_logp: 1 there.

    Beyond Log Likelihood, arXiv 2510.00526: OnlyTopP, OnlyBottomP, OnlyTopLogP, OnlyBottomLogP of its trainer.
    """
    p_N = statistics.p_N
    counts_N = p_N >= probability if kind.startswith("top") else p_N <= probability
    return counts_N.to(p_N.dtype) if kind.endswith("logp") else p_N * counts_N


@register("sum_p2_N")
def deft(statistics: TokenStatistics) -> Tensor:
    """w = p^a, a = sum_v p_v^2 (exp of minus the Renyi-2 entropy): dft where the model is sure, nll where it is not.

    Dynamic Entropy Fine-Tuning, arXiv 2602.11424; the branch "DEFT" of luludus/DEFT's trainer.
    """
    return (_given(statistics.sum_p2_N) * statistics.logp_N).exp()


@register("segments_N")
def deft_cayley(statistics: TokenStatistics) -> Tensor:
    """w = p^a, a = f + (1 - f) p / (2 - p) within [0.001, 1], f = half of the mean p of the token's sequence.

    The branch "Cayley_Trans" of luludus/DEFT's trainer (arXiv 2602.11424), where f is over the micro-batch: the same
    for a micro-batch of one sample.
    """
    p_N = statistics.p_N
    floor_N = 0.5 * statistics.segment_mean(p_N)
    alpha_N = floor_N + (1 - floor_N) * p_N / (2 - p_N)
    return (alpha_N.clamp(0.001, 1.0) * statistics.logp_N).exp()


@register("top_entropy_N")
def eaft(statistics: TokenStatistics, *, alpha: Exponent = 1.0) -> Tensor:
    """w = (H_20 / ln 20)^alpha, H_20 the entropy of the 20 largest probabilities, renormalised.

    Entropy-Adaptive Fine-Tuning, arXiv 2601.02151; LLaMA-Factory divides by 3.0 for ln 20.
    """
    return (_given(statistics.top_entropy_N).clamp(min=0) / math.log(TOP_K)) ** alpha


@register("segments_N", vanishing=True)
def sentence(statistics: TokenStatistics) -> Tensor:
    """w = product of p over the sequence (Table 5 of arXiv 2508.05629). Next to nothing for answers of some length."""
    return statistics.segment_sum(statistics.logp_N).exp()


@register("segments_N")
def geometric_mean(statistics: TokenStatistics) -> Tensor:
    """w = geometric mean of p over the sequence (Table 5 of arXiv 2508.05629)."""
    return statistics.segment_mean(statistics.logp_N).exp()


@register(anchored=True)
def asft(statistics: TokenStatistics, *, kl_weight: Coefficient = 0.05) -> Tensor:
    """w = p, and kl_weight x KL(reference || model) of every supervised token: DFT anchored to a frozen reference.

    Anchored Supervised Fine-Tuning, arXiv 2509.23753 (ICLR 2026); mode "asft" of zhuchichi56/ASFT's trainer.
    """
    return statistics.p_N


@register("ref_logp_N", "segments_N")
def iw_sft(statistics: TokenStatistics, *, temperature: Coefficient = 2.0, weight_cap: WeightCap = None) -> Tensor:
    """w = min(exp(temperature x mean over the sequence of log p / p_ref), weight_cap); the authors' cap is 16.

    Importance-weighted SFT, arXiv 2507.12856; emmyqin/iw_sft, bounding_trainers.py, with sum_over_time. The temperature
    of its loss is 2 where none is given; its trainer gives 1.
    """
    ratio_N = (temperature * statistics.segment_mean(statistics.log_ratio_N())).exp()
    return ratio_N.clamp(max=16.0 if weight_cap is None else weight_cap)


@register("ref_logp_N")
def iw_sft_token(statistics: TokenStatistics) -> Tensor:
    """w = p / p_ref within [0.2, 1.8], token by token: emmyqin/iw_sft, bounding_trainers.py, without sum_over_time."""
    return statistics.log_ratio_N().exp().clamp(0.2, 1.8)


@register("ref_logp_N")
def psft(statistics: TokenStatistics, *, clip_ratio_high: Coefficient = 0.28) -> Tensor:
    """w = r where r = p / p_ref <= 1 + clip_ratio_high, else 0: the gradient of PPO's clipped -r with advantage 1.

    With a positive advantage the lower clip never binds. Proximal SFT, arXiv 2508.17784 (ICLR 2026). The authors take
    the model at the start of each outer batch for the reference; here it is the one that ref_logp_N came from.
    """
    ratio_N = statistics.log_ratio_N().clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO).exp()
    return ratio_N * (ratio_N <= 1 + clip_ratio_high)
