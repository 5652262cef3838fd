"""The objectives: name -> the weight that each supervised token's NLL gets.

Every objective is  L = sum_n w_n * (-log p_n) / N  with w_n detached and N the supervised tokens of the global batch,
the same N for all of them: an objective decides w and nothing else. Adding one is one function here.
Knows nothing about hidden states, heads or batches; ``vlm_dft.head`` computes the statistics and applies the weights.

Shapes: N supervised tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from vlm_dft.config import ObjectiveConfig
from vlm_dft.errors import ConfigError


@dataclass(frozen=True)
class TokenStatistics:
    """What the model predicts at each supervised token, float32 or wider, without a graph.

    A statistic that the objective did not declare may be None: the head computes only what was asked for.
    """

    logp_N: Tensor  # noqa: N815
    """Log-probability of the target."""
    entropy_N: Tensor | None = None  # noqa: N815
    """Entropy of the predicted distribution in nats."""

    @property
    def p_N(self) -> Tensor:  # noqa: N802  shapes are suffixes
        """Probability of the target."""
        return self.logp_N.exp()


WeightFn = Callable[..., Tensor]


@dataclass(frozen=True)
class Objective:
    """One objective with its options filled in."""

    name: str
    weight_fn: Callable[[TokenStatistics], Tensor]
    """TokenStatistics -> weights of shape N."""
    needs: frozenset[str]
    """Optional fields of TokenStatistics that weight_fn reads."""

    def weights(self, statistics: TokenStatistics) -> Tensor:
        """Detached weights of shape N: no gradient flows through them, whatever weight_fn does."""
        with torch.no_grad():
            return self.weight_fn(statistics)


_REGISTRY: Final[dict[str, tuple[WeightFn, frozenset[str]]]] = {}


def register(*needs: str) -> Callable[[WeightFn], WeightFn]:
    """Enter a weight function under its own name; its keyword-only arguments are the objective's options."""

    def enter(weight_fn: WeightFn) -> WeightFn:
        _REGISTRY[weight_fn.__name__] = (weight_fn, frozenset(needs))
        return weight_fn

    return enter


@register()
def nll(statistics: TokenStatistics) -> Tensor:
    """w = 1: plain supervised fine-tuning."""
    return torch.ones_like(statistics.logp_N)


@register()
def dft(statistics: TokenStatistics, *, weight_floor: float = 0.0) -> Tensor:
    """w = max(p, weight_floor): Dynamic Fine-Tuning (arXiv 2508.05629), whose gradient is that of -p.

    A floor keeps rare tokens, the end of turn above all, learnable.
    """
    return statistics.p_N.clamp(min=weight_floor)


def names() -> list[str]:
    """The objectives there are."""
    return sorted(_REGISTRY)


def objective(name: str, **options: Any) -> Objective:
    """Look an objective up and fill its options in. Raises ConfigError that lists what there is."""
    if name not in _REGISTRY:
        raise ConfigError(f"unknown objective {name!r}: there are {', '.join(names())}", param="objective.name")
    weight_fn, needs = _REGISTRY[name]
    known = options_of(weight_fn)
    for option in options:
        if option not in known:
            listed = f"its options are {', '.join(known)}" if known else "it has no options"
            raise ConfigError(f"objective {name} does not know {option!r}: {listed}", param=f"objective.{option}")
    return Objective(name, partial(weight_fn, **options), needs)


def options_of(weight_fn: WeightFn) -> list[str]:
    """Names of a weight function's options."""
    parameters = inspect.signature(weight_fn).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY]


def from_config(config: ObjectiveConfig) -> Objective:
    """The objective of a run; settings that it does not take were refused by the config."""
    known = options_of(_REGISTRY[config.name][0]) if config.name in _REGISTRY else []
    options = {key: value for key, value in config.model_dump(exclude={"name"}).items() if key in known}
    return objective(config.name, **options)
