"""`vlm-dft doctor`: what is here, what is missing, and how to get it. Looks only; changes nothing."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
import typer
from rich.text import Text

from cli.client import EXIT_FAILED, AsJson, base_url, out, print_json

_GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One thing looked at; ok None means that it is optional and absent."""

    name: str
    ok: bool | None
    detail: str
    remedy: str = ""


def doctor(as_json: AsJson = False) -> None:
    """Say what is missing and how to get it; exit code 1 when something needed is."""
    from service.settings import get_settings

    settings = get_settings()
    findings = [
        _python(),
        *(_package(name, extra) for name, extra in _PACKAGES),
        _torch(),
        _gpus(),
        _broker(settings.broker_url),
        _disk(settings.data),
        _models(settings.resolved_models_dir),
        _benchmarks(settings.resolved_benchmarks),
        _vlmevalkit(),
        _service(),
    ]
    needed_are_here = not any(finding.ok is False for finding in findings)
    if as_json:
        print_json({"ok": needed_are_here, "data": [asdict(finding) for finding in findings]})
    else:
        _print(findings)
    if not needed_are_here:
        raise typer.Exit(EXIT_FAILED)


def _print(findings: list[Finding]) -> None:
    marks = {True: ("ok     ", "green"), False: ("missing", "red"), None: ("absent ", "yellow")}
    for finding in findings:
        out.print(Text.assemble(marks[finding.ok], f" {finding.name}: {finding.detail}"))
        if finding.ok is not True and finding.remedy:
            out.print(Text(f"        {finding.remedy}"))


_PACKAGES = (
    ("fastapi", "service"),
    ("celery", "service"),
    ("sqlalchemy", "service"),
    ("transformers", "train"),
    ("peft", "train"),
    ("qwen-vl-utils", "train"),
    ("latex2sympy2-extended", "eval"),
    ("math-verify", "eval"),
)


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding("python", sys.version_info >= (3, 11), version, "install Python 3.11 or newer")


def _package(name: str, extra: str) -> Finding:
    try:
        return Finding(name, True, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, False, "not installed", f"pip install -c constraints.txt '.[{extra}]'")


def _torch() -> Finding:
    # In a process of its own: importing torch here takes seconds and may fail in the ways that are being looked for.
    code = "import torch; print(torch.__version__, 'CUDA' if torch.cuda.is_available() else 'CPU')"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    remedy = "pip install -c constraints.txt '.[train]'"
    return Finding("torch", answer.returncode == 0, answer.stdout.strip() or answer.stderr.strip()[-200:], remedy)


def _gpus() -> Finding:
    from worker.inventory import gpus

    found = gpus()
    names = ", ".join(f"{gpu.name} {gpu.memory_total_gib:.0f} GiB" for gpu in found)
    remedy = "training runs on the CPU; for a GPU install its driver (nvidia-smi must work)"
    return Finding("gpu", True if found else None, names or "none found", remedy)


def _broker(url: str | None) -> Finding:
    if url:
        return Finding("broker", True, url.split("@")[-1])
    found = shutil.which("valkey-server") or shutil.which("redis-server")
    remedy = "wake-ups use files, about 1 s slower; for Redis install valkey or set VLM_DFT_BROKER_URL"
    return Finding("broker", True if found else None, found or "no redis on PATH", remedy)


def _disk(data: Path) -> Finding:
    existing = next(path for path in (data, *data.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    remedy = "free space or set VLM_DFT_DATA_DIR to another disk"
    return Finding("disk", free > 5 * _GIB, f"{free / _GIB:.0f} GiB free for {data}", remedy)


def _models(directory: Path) -> Finding:
    names = sorted(path.parent.name for path in directory.glob("*/config.json"))
    remedy = f"put a model directory under {directory}, or try one: python -m vlm_dft.tiny {directory}/tiny"
    return Finding("base models", True if names else None, ", ".join(names) or "none", remedy)


def _benchmarks(directory: Path) -> Finding:
    from vlm_dft.errors import BenchmarkError
    from vlm_dft.evaluation.provision import find_benchmarks, how_to_add, unknown_benchmarks

    try:
        names = ", ".join(find_benchmarks(directory))
    except BenchmarkError as error:
        return Finding("benchmarks", False, error.message)
    if unknown := unknown_benchmarks(directory):
        detail = f"{names or 'none'}; of {', '.join(path.name for path in unknown)} nothing says what it is"
        return Finding("benchmarks", None, detail, how_to_add(unknown[0]))
    remedy = f"put MathVerse, MathVision or WeMath files under {directory}, or set VLM_DFT_BENCHMARKS"
    return Finding("benchmarks", True if names else None, names or "none", remedy)


def _vlmevalkit() -> Finding:
    from vlm_dft.evaluation.vlmevalkit.installation import Unavailable, find_installation

    found = find_installation()
    if isinstance(found, Unavailable):
        remedy = f"evaluations score natively; for VLMEvalKit: {found.remedy}"
        return Finding("vlmevalkit", False if found.is_configured else None, found.reason, remedy)
    versions = ", ".join(f"{name} {found.versions[name]}" for name in ("torch", "transformers"))
    return Finding("vlmevalkit", True, f"{found.scorer} in {found.root}, {versions}")


def _service() -> Finding:
    url = base_url().removesuffix("/").removesuffix("/v1") + "/readyz"
    try:
        answer = httpx.get(url, timeout=3)
    except httpx.HTTPError:
        return Finding("service", None, f"no answer from {url}", "start it with `vlm-dft up`")
    try:
        told = answer.json()
        wrong = [f"{name}: {check['detail']}" for name, check in told["checks"].items() if not check["ok"]]
        said = "; ".join([told["status"], *wrong])
    except (ValueError, KeyError, TypeError):
        return Finding("service", False, f"{url} is no vlm-dft service", "set OPENAI_BASE_URL, with /v1 at its end")
    return Finding("service", answer.status_code == 200, f"{url} says {said}", "see the service's logs")
