"""The registry: weights by hand, options checked, no gradient through a weight."""

from __future__ import annotations

import math

import pytest
import torch

from vlm_dft import objectives
from vlm_dft.config import ObjectiveConfig
from vlm_dft.errors import ConfigError
from vlm_dft.objectives import TokenStatistics


def statistics(*probabilities: float) -> TokenStatistics:
    return TokenStatistics(logp_N=torch.tensor(probabilities, dtype=torch.float64).log())


def test_nll_weights_every_token_one():
    assert objectives.objective("nll").weights(statistics(0.001, 0.5, 1.0)).tolist() == [1.0, 1.0, 1.0]


def test_dft_weight_is_the_probability():
    weights = objectives.objective("dft").weights(statistics(0.001, 0.5, 1.0)).tolist()
    assert weights == pytest.approx([0.001, 0.5, 1.0])


def test_dft_weight_never_falls_below_its_floor():
    weights = objectives.objective("dft", weight_floor=0.1).weights(statistics(0.001, 0.5, 1.0)).tolist()
    assert weights == pytest.approx([0.1, 0.5, 1.0])


def test_weights_carry_no_gradient():
    logp_N = torch.tensor([math.log(0.3)], requires_grad=True)
    assert not objectives.objective("dft").weights(TokenStatistics(logp_N=logp_N)).requires_grad


def test_unknown_objective_lists_those_there_are():
    with pytest.raises(ConfigError, match=r"unknown objective 'focal': there are dft, nll") as caught:
        objectives.objective("focal")
    assert caught.value.param == "objective.name"


def test_unknown_option_lists_those_there_are():
    with pytest.raises(ConfigError, match="dft does not know 'alpha': its options are weight_floor"):
        objectives.objective("dft", alpha=2.0)
    with pytest.raises(ConfigError, match="nll does not know 'weight_floor': it has no options"):
        objectives.objective("nll", weight_floor=0.1)


def test_configs_become_objectives():
    assert objectives.from_config(ObjectiveConfig()).name == "nll"
    floored = objectives.from_config(ObjectiveConfig(name="dft", weight_floor=0.2))
    assert floored.weights(statistics(0.1, 0.6)).tolist() == pytest.approx([0.2, 0.6])


def test_every_objective_of_the_config_is_registered():
    from typing import get_args

    from vlm_dft import config

    assert set(get_args(config.Objective)) == set(objectives.names())


def test_a_new_objective_is_one_function(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(objectives, "_REGISTRY", dict(objectives._REGISTRY))

    @objectives.register("entropy_N")
    def by_entropy(statistics: TokenStatistics, *, scale: float = 1.0) -> torch.Tensor:
        assert statistics.entropy_N is not None
        return scale * statistics.entropy_N

    found = objectives.objective("by_entropy", scale=2.0)
    assert found.needs == {"entropy_N"}
    entropy_N = torch.tensor([0.5, 1.5])
    assert found.weights(TokenStatistics(logp_N=entropy_N, entropy_N=entropy_N)).tolist() == [1.0, 3.0]
