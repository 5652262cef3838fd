"""The registry: every objective's weights by hand, options checked, no gradient through a weight."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from pydantic import ValidationError

from vlm_dft import objective_config, objectives
from vlm_dft.errors import ConfigError
from vlm_dft.head import objective_loss
from vlm_dft.objective_config import OBJECTIVE_OPTIONS, ObjectiveConfig
from vlm_dft.objectives import TokenStatistics


def statistics(*probabilities: float, **more: list[float] | list[int]) -> TokenStatistics:
    logp_N = torch.tensor(probabilities, dtype=torch.float64).log()
    given = {
        name: torch.tensor(values, dtype=torch.int64 if name == "segments_N" else torch.float64)
        for name, values in more.items()
    }
    return TokenStatistics(logp_N=logp_N, **given)


def weights(name: str, given: TokenStatistics, **options: float | str) -> list[float]:
    return objectives.objective(name, **options).weights(given).tolist()


def test_nll_weights_every_token_one():
    assert weights("nll", statistics(0.001, 0.5, 1.0)) == [1.0, 1.0, 1.0]


def test_dft_weight_is_the_probability():
    assert weights("dft", statistics(0.001, 0.5, 1.0)) == pytest.approx([0.001, 0.5, 1.0])


def test_dft_weight_stays_between_floor_and_cap():
    found = weights("dft", statistics(0.001, 0.5, 1.0), weight_floor=0.1, weight_cap=0.9)
    assert found == pytest.approx([0.1, 0.5, 0.9])


def test_dft_nll_blends_the_two_weights():
    assert weights("dft_nll", statistics(0.2, 1.0), nll_share=0.25) == pytest.approx([0.75 * 0.2 + 0.25, 1.0])


def test_power_weight_is_a_power_of_the_probability():
    assert weights("power", statistics(0.25, 1.0), alpha=0.5) == pytest.approx([0.5, 1.0])
    assert weights("power", statistics(0.25), alpha=2.0) == pytest.approx([0.0625])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("top_p", [0.0, 0.5, 0.9]),
        ("bottom_p", [0.1, 0.5, 0.0]),
        ("top_logp", [0.0, 1.0, 1.0]),
        ("bottom_logp", [1.0, 1.0, 0.0]),
    ],
)
def test_threshold_takes_tokens_on_one_side_and_on_the_border(kind: str, expected: list[float]):
    given = TokenStatistics(logp_N=torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64).log())
    border = given.p_N[1].item()
    assert weights("threshold", given, kind=kind, probability=border) == pytest.approx(expected)


def test_deft_is_dft_where_the_model_is_sure_and_nll_where_it_is_flat():
    found = weights("deft", statistics(0.2, 0.2, 0.25, sum_p2_N=[1.0, 0.0, 0.5]))
    assert found == pytest.approx([0.2, 1.0, 0.5])


def test_deft_cayley_by_hand():
    # Sequence 0: mean p 0.5, floor 0.25. p = 0.2: a = 0.25 + 0.75 x 0.2 / 1.8 = 1/3. p = 0.8: 0.25 + 0.75 x 0.8 / 1.2.
    found = weights("deft_cayley", statistics(0.2, 0.8, 1.0, segments_N=[0, 0, 1]))
    assert found == pytest.approx([0.2 ** (1 / 3), 0.8**0.75, 1.0])


def test_eaft_weight_is_the_share_of_the_largest_entropy():
    full = math.log(20)
    assert weights("eaft", statistics(0.5, 0.5, top_entropy_N=[full, full / 4])) == pytest.approx([1.0, 0.25])
    assert weights("eaft", statistics(0.5, top_entropy_N=[full / 4]), alpha=0.5) == pytest.approx([0.5])


def test_sentence_weight_is_the_probability_of_the_sequence():
    found = weights("sentence", statistics(0.5, 0.25, 0.1, segments_N=[0, 0, 1]))
    assert found == pytest.approx([0.125, 0.125, 0.1])


def test_geometric_mean_weight_does_not_shrink_with_length():
    found = weights("geometric_mean", statistics(0.5, 0.125, 0.1, segments_N=[1, 1, 0]))
    assert found == pytest.approx([0.25, 0.25, 0.1])


def test_asft_is_dft_with_an_anchor():
    chosen = objectives.objective("asft", kl_weight=0.1)
    assert chosen.weights(statistics(0.3)).tolist() == pytest.approx([0.3])
    assert (chosen.kl_weight, chosen.needs_reference) == (0.1, True)


def test_iw_sft_weight_by_hand():
    given = statistics(0.4, 0.9, 0.5, segments_N=[0, 0, 1], ref_logp_N=[math.log(p) for p in (0.2, 0.9, 0.001)])
    # Sequence 0: mean log-ratio ln(2)/2, times 2: weight 2. Sequence 1: ratio 500, squared: capped.
    assert weights("iw_sft", given) == pytest.approx([2.0, 2.0, 16.0])
    assert weights("iw_sft", given, temperature=1.0, weight_cap=1.2) == pytest.approx([1.2, 1.2, 1.2])


def test_iw_sft_token_ratio_is_clipped_on_both_sides():
    given = statistics(0.05, 0.6, 0.9, ref_logp_N=[math.log(0.5)] * 3)
    assert weights("iw_sft_token", given) == pytest.approx([0.2, 1.2, 1.8])


def test_psft_lets_go_of_tokens_that_have_grown_enough():
    given = statistics(0.25, 0.6, 0.65, ref_logp_N=[math.log(0.5)] * 3)
    assert weights("psft", given) == pytest.approx([0.5, 1.2, 0.0])
    assert weights("psft", given, clip_ratio_high=0.1) == pytest.approx([0.5, 0.0, 0.0])


def test_psft_weight_is_the_gradient_of_the_clipped_ratio():
    reference = math.log(0.5)
    logp_N = torch.tensor([0.05, 0.5, 0.63, 0.65], dtype=torch.float64).log().requires_grad_()
    ratio_N = (logp_N - reference).exp()
    clipped = -torch.minimum(ratio_N, ratio_N.clamp(0.8, 1.28)).sum()
    (expected,) = torch.autograd.grad(clipped, logp_N)
    given = TokenStatistics(logp_N=logp_N, ref_logp_N=torch.full_like(logp_N, reference))
    assert weights("psft", given) == pytest.approx((-expected).tolist())


@pytest.mark.parametrize("alpha", [0.3, 1.0, 2.0])
def test_power_weight_is_the_gradient_of_its_authors_loss(alpha: float):
    logp_N = torch.tensor([0.01, 0.5, 0.99], dtype=torch.float64).log().requires_grad_()
    (expected,) = torch.autograd.grad(((1 - (alpha * logp_N).exp()) / alpha).sum(), logp_N)
    assert weights("power", TokenStatistics(logp_N=logp_N), alpha=alpha) == pytest.approx((-expected).tolist())


def test_weights_carry_no_gradient():
    logp_N = torch.tensor([math.log(0.3)], requires_grad=True)
    assert not objectives.objective("dft").weights(TokenStatistics(logp_N=logp_N)).requires_grad


def test_unknown_objective_lists_those_there_are():
    with pytest.raises(ConfigError, match=r"unknown objective 'focal': there are asft, deft, .*, threshold") as caught:
        objectives.objective("focal")
    assert caught.value.param == "objective.name"


def test_unknown_option_lists_those_there_are():
    with pytest.raises(ConfigError, match="dft does not know 'alpha': its options are weight_floor, weight_cap"):
        objectives.objective("dft", alpha=2.0)
    with pytest.raises(ConfigError, match="nll does not know 'weight_floor': it has no options"):
        objectives.objective("nll", weight_floor=0.1)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("dft", "weight_floor", -0.1),
        ("dft", "weight_floor", 1.1),
        ("dft", "weight_cap", 0.0),
        ("dft_nll", "nll_share", 2),
        ("power", "alpha", 0.0),
        ("power", "alpha", math.nan),
        ("threshold", "kind", "middle_p"),
        ("threshold", "probability", "much"),
        ("asft", "kl_weight", -1.0),
    ],
)
def test_impossible_options_are_refused_by_registry_and_config(name: str, option: str, value: float | str):
    with pytest.raises(ConfigError, match=f"objective {name}: {option} is ") as caught:
        objectives.objective(name, **{option: value})
    assert caught.value.param == f"objective.{option}"
    with pytest.raises(ValidationError):
        ObjectiveConfig.model_validate({"name": name, option: value})


def test_config_and_registry_know_the_same_objectives_options_and_defaults():
    assert set(get_args(objective_config.Objective)) == set(objectives.names())
    for name, options in OBJECTIVE_OPTIONS.items():
        assert list(options) == objectives.options_of(name)
        assert objectives.from_config(ObjectiveConfig(name=name)) is not None
        entry = objectives._REGISTRY[name]
        assert dict(entry.options()) == ObjectiveConfig(name=name).options


def test_configs_become_objectives():
    assert objectives.from_config(ObjectiveConfig()).name == "nll"
    floored = objectives.from_config(ObjectiveConfig(name="dft", weight_floor=0.2))
    assert floored.weights(statistics(0.1, 0.6)).tolist() == pytest.approx([0.2, 0.6])
    rooted = objectives.from_config(ObjectiveConfig(name="power", alpha=0.5))
    assert rooted.weights(statistics(0.25)).tolist() == pytest.approx([0.5])


def test_an_option_of_another_objective_is_refused():
    with pytest.raises(ValidationError, match="weight_floor applies to the objective dft, not to nll: it has no opt"):
        ObjectiveConfig(weight_floor=0.1)
    with pytest.raises(ValidationError, match="alpha applies to the objective power and eaft, not to dft: its options"):
        ObjectiveConfig(name="dft", alpha=0.5)
    with pytest.raises(ValidationError, match=r"weight_cap 0\.1 is below weight_floor 0\.2"):
        ObjectiveConfig(name="dft", weight_floor=0.2, weight_cap=0.1)


def test_a_config_is_written_without_the_options_of_other_objectives():
    assert ObjectiveConfig(name="dft", weight_floor=0.1).model_dump() == {"name": "dft", "weight_floor": 0.1}
    for name in get_args(objective_config.Objective):
        written = ObjectiveConfig(name=name)
        assert ObjectiveConfig.model_validate_json(written.model_dump_json()) == written


def test_only_weights_below_p_vanish():
    vanishing = {name for name in objectives.names() if objectives.objective(name).vanishing}
    assert vanishing == {"dft", "power", "threshold", "sentence"}
    assert not objectives.objective("dft", weight_floor=0.1).vanishing
    assert not objectives.objective("power", alpha=0.9).vanishing
    assert not objectives.objective("threshold", kind="bottom_logp").vanishing


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
    flat = objective_loss(torch.zeros(1, 3), torch.eye(3), torch.tensor([0]), objective=found, statistics="target")
    assert flat.weight_M.item() == pytest.approx(2 * math.log(3))
    with pytest.raises(ConfigError, match="by_entropy: scale is 'much'"):
        objectives.objective("by_entropy", scale="much")
