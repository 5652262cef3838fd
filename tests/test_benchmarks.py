"""The benchmarks' command and what their gates rest on; the benchmarks themselves run by ``python -m benchmarks all``.

Shapes: N rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from benchmarks import __main__ as command
from benchmarks.accuracy import truth
from benchmarks.datasets import words, write_picture
from benchmarks.fixtures import HeadInputs, head_inputs


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The benchmark "resume" takes no time; where results go."""
    stand_in = SimpleNamespace(measure=lambda: {"ratio": 1.23456789, "by": {"sizes": [0.333333333, 4]}})
    monkeypatch.setitem(sys.modules, "benchmarks.resume", stand_in)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(command, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def test_a_benchmark_prints_one_line_and_writes_nothing_unless_asked(
    measured: Path, capsys: pytest.CaptureFixture[str]
):
    assert command.main(["resume"]) == 0
    (printed,) = capsys.readouterr().out.splitlines()
    line = json.loads(printed)
    assert (line["benchmark"], line["ratio"], line["by"]) == ("resume", 1.235, {"sizes": [0.3333, 4]})
    assert line["versions"]["torch"] == torch.__version__
    assert line["machine"]
    assert not measured.exists()
    assert command.main(["resume", "--save"]) == 0
    assert json.loads((measured / "resume.json").read_text()) == json.loads(capsys.readouterr().out)


def test_all_runs_each_though_one_fails_and_tells_of_it(monkeypatch: pytest.MonkeyPatch):
    ran: list[tuple[str, list[str]]] = []

    def run_alone(name: str, options: list[str]) -> int:
        ran.append((name, options))
        return int(name == failing)

    monkeypatch.setattr(command, "_run_alone", run_alone)
    failing = "step"
    assert command.main(["all", "--save"]) == 1
    assert ran == [(name, ["--save"]) for name in command.NAMES]
    failing = ""
    assert command.main(["all"]) == 0


def test_every_name_is_a_module_that_measures():
    for name in command.NAMES:  # read, not imported: peers may not be installed
        source = Path(command.__file__).with_name(f"{name.replace('-', '_')}.py").read_text()
        functions = [node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
        assert "measure" in functions, name


def test_an_unknown_name_is_refused_with_those_there_are(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        command.main(["haed"])
    assert "head-memory" in capsys.readouterr().err


def test_a_peer_that_is_not_installed_is_asked_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    assert command.main(["step"]) == 1
    assert "pip install -e '.[peers]'" in capsys.readouterr().err


def test_the_benchmarks_beside_peers_are_those_that_import_them():
    def imported(name: str) -> str:
        return Path(command.__file__).with_name(f"{name.replace('-', '_')}.py").read_text()

    assert set(command.BESIDE_PEERS) == {
        name for name in command.NAMES if "from trl" in imported(name) or "import peers" in imported(name)
    }


def test_the_truth_is_the_definition_and_its_errors_are_relative():
    inputs = head_inputs("flat", rows=12, hidden=32, vocabulary=5000)
    hidden_ND, weight_VD = (tensor.double().requires_grad_() for tensor in (inputs.hidden_ND, inputs.weight_VD))
    logp_N = (hidden_ND @ weight_VD.T).log_softmax(1).gather(1, inputs.labels_N[:, None]).squeeze(1)
    loss = (logp_N.detach().exp() * -logp_N).mean()
    hidden, weight = torch.autograd.grad(loss, (hidden_ND, weight_VD))
    found = truth(inputs).errors(loss.item(), hidden, weight)
    assert max(found.loss, found.hidden, found.weight) < 1e-12
    off = truth(inputs).errors(1.01 * loss.item(), 1.02 * hidden, 1.03 * weight)
    assert (off.loss, off.hidden, off.weight) == pytest.approx((0.01, 0.02, 0.03))


@pytest.mark.parametrize("kind", ["peaked", "flat", "random"])
def test_a_fixture_depends_on_its_seed_alone(kind):
    def made(seed: int) -> HeadInputs:
        return head_inputs(kind, rows=4, hidden=16, vocabulary=512, seed=seed)

    one, same, other = made(0), made(0), made(1)
    for name in ("hidden_ND", "weight_VD", "labels_N"):
        assert torch.equal(getattr(one, name), getattr(same, name))
        assert not torch.equal(getattr(one, name), getattr(other, name))


def test_pictures_and_words_depend_on_their_seed_alone(tmp_path: Path):
    one, same, other = (write_picture(tmp_path, (56, 28), seed) for seed in (0, 0, 1))
    assert one == same
    assert one.sha256 != other.sha256
    with Image.open(tmp_path / one.image) as picture:
        assert picture.size == (56, 28)
    assert len(set(words(300))) == 300
    assert words(5, seed=1) == words(5, seed=1) != words(5, seed=2)
