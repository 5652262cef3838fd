"""Extra memory of the loss head's forward and backward: peak RSS over inputs and the weight's gradient.

A fresh process for every head and number of rows. The baseline process makes inputs and a weight gradient and nothing
else. Float32, hidden 896, vocabulary 151,936, half of the rows supervised, no statistics left out, our settings as they
are by default. Ours is also run on twice the rows: it should not grow. Peers do, and are compared at the fewer.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

ROWS = (1024, 2048)
PEERS = ("trl_gathered", "trl_as_on_cpu", "full_logits")


def measure() -> dict[str, Any]:
    """The benchmark's line; ratio is the leanest peer's extra memory over ours."""
    extra: dict[str, dict[str, float]] = {}
    seconds: dict[str, float] = {}
    bases = {rows: _child("baseline", rows)[0] for rows in ROWS}
    for name in ("ours", *PEERS):
        extra[name] = {}
        for rows in ROWS if name == "ours" else ROWS[:1]:
            base = bases[rows]
            peak, taken = _child(name, rows)
            extra[name][str(rows)] = (peak - base) / 2**10
            seconds.setdefault(name, taken)
    ours = extra["ours"]
    first = str(ROWS[0])
    leanest = min(extra[name][first] for name in PEERS)
    return {
        "ratio": leanest / ours[first],
        "twice_the_rows": ours[str(ROWS[1])] / ours[first],
        "extra_mib": extra,
        "process_seconds": seconds,
    }


def _child(name: str, rows: int) -> tuple[int, float]:
    """Peak RSS in KiB and process seconds of a fresh process."""
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks.head_memory", name, str(rows)], check=True, capture_output=True, text=True
    )
    peak, seconds = finished.stdout.split()[-2:]
    return int(peak), float(seconds)


def _main(name: str, rows: int) -> None:
    from benchmarks import peers
    from benchmarks.fixtures import head_inputs
    from vlm_dft.head import objective_loss

    torch.set_num_threads(1)
    inputs = head_inputs("peaked", rows=rows // 2)
    hidden_ND, weight_VD, labels_N = inputs.hidden_ND, inputs.weight_VD, inputs.labels_N
    if name in ("trl_as_on_cpu", "full_logits"):
        hidden_ND = torch.cat([hidden_ND, hidden_ND])
        labels_N = torch.cat([labels_N, torch.full_like(labels_N, -100)])
    hidden_ND.requires_grad_()
    weight_VD.requires_grad_()
    # What came before, building the fixture, must not hide what comes.
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")
    began = time.process_time()
    if name == "baseline":
        weight_VD.grad = torch.ones_like(weight_VD)
    else:
        heads: dict[str, Callable[..., torch.Tensor]] = {
            "ours": lambda *given: objective_loss(*given, tolerance=1e-6).loss,
            "trl_gathered": peers.trl,
            "trl_as_on_cpu": peers.trl,
            "full_logits": peers.full_logits,
        }
        heads[name](hidden_ND, weight_VD, labels_N).backward()
    print(_peak_kib(), time.process_time() - began)


def _peak_kib() -> int:
    """VmHWM, which clear_refs resets; ru_maxrss is not reset."""
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]))
