"""No cut of a step changes its gradient: micro-batches, packs, ranks and order, for every objective there is."""

from __future__ import annotations

import pytest
from datasets_for_tests import shapes_dataset, sums_dataset
from gradients_for_tests import relative
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from splits_for_tests import ROWS, Problem, problem_of, split_gradient

from vlm_dft import objectives
from vlm_dft.batches import Plan, Steps

FAMILIES = ("tiny_vlm", "tiny_qwen2", "tiny_llama")


@pytest.fixture(scope="module")
def problems(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Problem]:
    """Steps of short, long, masked, text and picture rows."""
    made = {}
    for family in FAMILIES:
        write = shapes_dataset if family == "tiny_vlm" else sums_dataset
        dataset = write(tmp_path_factory.mktemp(family) / "dataset", ROWS, masked=[1, 4])
        made[family] = problem_of(request.getfixturevalue(family), dataset)
    return made


@pytest.mark.parametrize("objective", objectives.names())
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_every_split_of_a_step_gives_the_gradient_of_the_definition(
    objective: str, problems: dict[str, Problem], data: st.DataObject
):
    problem = problems[data.draw(st.sampled_from(FAMILIES), label="family")]
    pack_length = data.draw(st.none() | st.integers(90, 700), label="pack length")
    found = split_gradient(
        problem,
        objective,
        micro_batch_size=data.draw(st.integers(1, ROWS), label="micro-batch size") if pack_length is None else 1,
        pack_length=pack_length,
        num_ranks=data.draw(st.integers(1, 4), label="ranks"),
        order=data.draw(st.integers(0, 999), label="order"),
    )
    assert relative(found, problem.definition(objective)) < 1e-5


@pytest.mark.parametrize("objective", ["dft", "sentence"])
def test_held_out_numbers_do_not_depend_on_the_split_either(objective: str, problems: dict[str, Problem]):
    problem = problems["tiny_vlm"]
    found = []
    for micro_batch_size, pack_length, num_ranks in ((1, None, 1), (3, None, 2), (1, 200, 1), (1, 700, 3)):
        optimization, _ = problem.optimization(objective, packing=pack_length is not None)
        totals = optimization.measure([])
        for rank in range(num_ranks):
            steps = Steps(
                problem.corpus,
                Plan(problem.corpus.kept, ROWS, seed=None),
                micro_batch_size=micro_batch_size,
                pad_token_id=problem.loaded.pad_token_id,
                pack_length=pack_length,
                rank=rank,
                num_ranks=num_ranks,
            )
            totals += optimization.measure(next(steps.read()))
        counts = optimization.counts(totals)
        found.append([counts.num_tokens, counts.input_tokens, counts.num_samples, *counts.sums.values()])
    assert found[0][0] > 0
    for numbers in found[1:]:
        assert numbers == pytest.approx(found[0], rel=1e-5)
