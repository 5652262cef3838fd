"""Trainer processes for tests that kill them: real processes, without a fresh import of torch for each.

A fork server imports the trainer once; every process is forked from it and then does what `python -m vlm_dft` does.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

from throwaway import free_port

from vlm_dft.run_dir import RunDir

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["vlm_dft.trainer", "vlm_dft.watchdog"])


def start_process(target: Callable[..., int | None], *arguments: str, log: Path, env: Mapping[str, str]) -> BaseProcess:
    """Run target, a module's function, in a process of its own with this log and one thread."""
    process = _CONTEXT.Process(target=_run, args=(target, arguments, str(log), dict(env)))
    process.start()
    return process


def start_trainer(run: RunDir, **env: str) -> BaseProcess:
    """`python -m vlm_dft RUN_DIR`."""
    return start_process(run_main, str(run.path), log=run.log_path, env=env)


def start_ranks(target: Callable[..., int | None], *arguments: str, count: int, log: Path) -> list[BaseProcess]:
    """The processes that torchrun would start on this machine."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
    shared["LOCAL_WORLD_SIZE"] = str(count)
    return [
        start_process(target, *arguments, log=log, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(count)
    ]


def exit_code(process: BaseProcess, seconds: float = 120) -> int:
    """Of a process that ends within that time; negative: the signal that ended it."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise AssertionError(f"still running after {seconds} s")
    return process.exitcode


def run_main(run_dir: str) -> int:
    from vlm_dft.__main__ import main

    return main([run_dir])


def _run(target: Callable[..., int | None], arguments: tuple[str, ...], log: str, env: dict[str, str]) -> None:
    import torch

    os.environ.update(env | {"CUDA_VISIBLE_DEVICES": ""})
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    sys.exit(target(*arguments))
