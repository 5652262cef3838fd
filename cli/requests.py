"""Parts of a request from what is typed: --set, --gate, lists with commas. The service judges the values."""

from __future__ import annotations

from typing import Annotated, Any

import typer

TrainingFile = Annotated[str, typer.Argument(help="A file to upload, or the id of one (file-...).")]
Lora = Annotated[bool, typer.Option("--lora", help="Train LoRA adapters, rank 8, alpha 16.")]
Looked = Annotated[
    list[str] | None,
    typer.Option("--set", help="How it is looked at: max_length_tokens=8192, pixels.max_pixels=200704; repeatable."),
]
Hyperparameters = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="A hyperparameter, KEY=VALUE, or another part, as in pixels.max_pixels=200704; repeatable."
    ),
]


def supervised_method(pairs: list[str] | None, *, lora: bool, **rest: Any) -> dict[str, Any]:
    """method.supervised of what --set and --lora say. Raises BadParameter."""
    supervised: dict[str, Any] = dict(rest)
    if lora:
        supervised["adapter"] = {"type": "lora"}
    put_pairs(supervised, pairs or [], within="hyperparameters")
    return supervised


def evaluation_of(
    benchmarks: str | None, limit: int | None, *, regression: str | None = None, gate: list[str] | None = None
) -> dict[str, Any]:
    """The request's evaluation, base model included; empty without benchmarks. Raises BadParameter."""
    if not benchmarks:
        for name, value in (("--limit", limit), ("--regression", regression), ("--gate", gate)):
            if value:
                raise typer.BadParameter(f"{name} says something of --benchmarks, which is not given")
        return {}
    plan: dict[str, Any] = {"benchmarks": benchmark_list(benchmarks, limit), "include_base": True}
    if regression:
        plan["regression"] = [name.strip() for name in regression.split(",")]
    rules: dict[str, dict[str, Any]] = {}
    for key, value in parse_pairs(gate or [], option="--gate").items():
        name, _, rule = key.rpartition(".")
        if not name:
            raise typer.BadParameter(f"--gate takes BENCHMARK.RULE=NUMBER, not {key}={value}")
        rules.setdefault(name, {"benchmark": name})[rule] = value
    if rules:
        plan["gate"] = list(rules.values())
    return {"evaluation": plan}


def benchmark_list(names: str, limit: int | None) -> list[dict[str, Any]]:
    """Comma-separated names as the API's list, each with the limit."""
    return [
        {"name": name.strip(), **({"limit": limit} if limit is not None else {})}
        for name in names.split(",")
        if name.strip()
    ]


def put_pairs(document: dict[str, Any], pairs: list[str], *, within: str | None = None) -> None:
    """KEY=VALUE strings into a document: a.b=1 into its part a, a key without a dot into the part within, if given."""
    for key, value in parse_pairs(pairs).items():
        *path, name = key.split(".")
        part: Any = document
        for step in path or filter(None, [within]):
            part = part.setdefault(step, {})
            if not isinstance(part, dict):
                raise typer.BadParameter(f"--set {key}: {step} is one value ({part}) and has no parts")
        part[name] = value


def parse_pairs(pairs: list[str], option: str = "--set") -> dict[str, Any]:
    """KEY=VALUE strings; numbers become numbers, everything else stays a string for the service to judge."""
    parsed: dict[str, Any] = {}
    for pair in pairs:
        key, separator, text = pair.partition("=")
        if not separator or not key:
            raise typer.BadParameter(f"{option} takes KEY=VALUE, not {pair!r}")
        parsed[key] = number_or_word(text)
    return parsed


def number_or_word(text: str) -> Any:
    """A number or a truth value where the text is one, else the text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text, text)
