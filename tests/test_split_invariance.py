"""No cut of a step changes its gradient: micro-batches, packs, ranks and order, for every objective there is."""

from __future__ import annotations

import pytest
from datasets_for_tests import shapes_dataset, sums_dataset
from gradients_for_tests import relative
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from splits_for_tests import ROWS, Problem, problem_of, split_gradient

from vlm_dft import objectives

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
