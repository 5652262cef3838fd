"""No cut of a step changes its gradient: micro-batches, packs, ranks and order, for every objective there is."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from datasets_for_tests import one_picture_dataset, shapes_dataset, sums_dataset
from gradients_for_tests import relative
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from processes_for_tests import exit_code, start_ranks
from splits_for_tests import (
    ROWS,
    Problem,
    numbers_of,
    problem_of,
    save_numbers_of_two_ranks,
    shares_of,
    split_gradient,
)

import vlm_dft.torchvision_shim  # noqa: F401

# isort: split
import torch

from vlm_dft import objectives
from vlm_dft.ranks import Ranks
from vlm_dft.telemetry import step_metrics

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
@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    family=st.sampled_from(FAMILIES),
    micro_batch_size=st.integers(1, ROWS),
    pack_length=st.none() | st.integers(90, 700),
    num_ranks=st.integers(1, 4),
    order=st.integers(0, 999),
)
@example(family="tiny_vlm", micro_batch_size=1, pack_length=170, num_ranks=2, order=1)
@example(family="tiny_llama", micro_batch_size=2, pack_length=None, num_ranks=3, order=2)
def test_every_split_of_a_step_gives_the_gradient_of_the_definition(
    objective: str,
    problems: dict[str, Problem],
    family: str,
    micro_batch_size: int,
    pack_length: int | None,
    num_ranks: int,
    order: int,
):
    problem = problems[family]
    found = split_gradient(
        problem,
        objective,
        micro_batch_size=micro_batch_size if pack_length is None else 1,
        pack_length=pack_length,
        num_ranks=num_ranks,
        order=order,
    )
    assert relative(found, problem.definition(objective)) < 1e-5


@pytest.mark.parametrize("objective", objectives.names())
def test_every_objective_tells_the_same_numbers(objective: str, problems: dict[str, Problem]):
    problem = problems["tiny_vlm"]
    optimization, ranks = problem.optimization(objective, packing=False)
    (micro_batches,) = shares_of(problem, optimization, micro_batch_size=3)
    ranks.step_tokens = sum(micro_batch.num_tokens for micro_batch in micro_batches)
    counts = optimization.gradients(micro_batches)
    told = {"step": 1, "epoch": 1.0, "grad_norm": 1.0, "learning_rate": 1e-3, "seconds": 2.0, "waited_seconds": 1.0}
    cpu = torch.device("cpu")
    metrics = step_metrics(counts, **told, device=cpu, anchored=optimization.objective.needs_reference)
    assert {name for name, value in metrics if value is None} == (set() if objective == "asft" else {"kl"})
    assert all(math.isfinite(value) for _, value in metrics if value is not None)
    assert metrics.nll > 1
    assert metrics.entropy > 1
    assert metrics.eos_nll > 1
    assert 0 < metrics.effective_sample_size <= 1 + 1e-9
    assert metrics.share_p_below_01 > 0.5
    assert metrics.peak_memory_gib > 0.1


@pytest.mark.parametrize("objective", objectives.names())
def test_held_out_numbers_do_not_depend_on_the_split_either(objective: str, problems: dict[str, Problem]):
    problem = problems["tiny_vlm"]
    found = []
    for micro_batch_size, pack_length, num_ranks in ((1, None, 1), (3, None, 2), (1, 200, 1), (1, 700, 3)):
        optimization, _ = problem.optimization(objective, packing=pack_length is not None)
        totals = optimization.measure([])
        layout = {"micro_batch_size": micro_batch_size, "pack_length": pack_length, "num_ranks": num_ranks}
        for share in shares_of(problem, optimization, **layout):
            totals += optimization.measure(share)
        counts = optimization.counts(totals)
        found.append([counts.num_tokens, counts.input_tokens, counts.num_samples, *counts.sums.values()])
    assert found[0][0] > 0
    for numbers in found[1:]:
        assert numbers == pytest.approx(found[0], rel=1e-5)


def test_two_processes_give_the_gradients_and_held_out_numbers_of_one(tiny_vlm: Path, tiny_llama: Path, tmp_path: Path):
    # 7 rows over 2 ranks: unequal numbers of micro-batches, a picture on one rank while the other has none.
    shapes = one_picture_dataset(tmp_path / "shapes", ROWS, masked=[1])
    sums = sums_dataset(tmp_path / "sums", ROWS, masked=[2])
    out, log = tmp_path / "numbers.pt", tmp_path / "log.txt"
    paths = [str(tiny_vlm), str(shapes), str(tiny_llama), str(sums)]
    processes = start_ranks(save_numbers_of_two_ranks, str(out), *paths, count=2, log=log)
    alone = Ranks()
    expected = {}
    for model, dataset in ((tiny_vlm, shapes), (tiny_llama, sums)):
        problem = problem_of(model, dataset)
        for name in objectives.names():
            expected[str(model), name] = numbers_of(problem, name, alone, micro_batch_size=3, pack_length=None)
    assert [exit_code(process) for process in processes] == [0, 0], log.read_text()
    found = torch.load(out, weights_only=True)
    assert found.keys() == expected.keys()
    for key, (gradients, numbers) in expected.items():
        assert relative(found[key][0], gradients) < 1e-5
        assert found[key][1] == pytest.approx(numbers, rel=1e-5)
