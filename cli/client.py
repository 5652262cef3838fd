"""The stock openai client pointed at our service, and errors as a person reads them. Knows no endpoint by itself."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Final

import openai
import typer
from rich.console import Console
from rich.text import Text

from vlm_dft.errors import VlmDftError

_PIPED_CHARACTERS: Final = 200
"""A table that goes into a file or to another program is as wide as it needs: what is cut off there is lost."""

out = Console(soft_wrap=True, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else _PIPED_CHARACTERS)
err = Console(stderr=True, soft_wrap=True)

EXIT_FAILED = 1
"""The service refused, or the job failed."""
EXIT_USAGE = 2
EXIT_UNREACHABLE = 3
"""No service answered."""


def base_url() -> str:
    """OPENAI_BASE_URL, else VLM_DFT_URL, else the address `vlm-dft up` serves."""
    return os.environ.get("OPENAI_BASE_URL") or os.environ.get("VLM_DFT_URL") or "http://127.0.0.1:8000/v1"


_connected: list[openai.OpenAI] = []
"""Clients whose command is not over."""


def connect() -> openai.OpenAI:
    """The client; a loopback service without keys takes any key. ``readable_errors`` closes it."""
    key = os.environ.get("OPENAI_API_KEY") or os.environ.get("VLM_DFT_API_KEY") or "none"
    _connected.append(openai.OpenAI(base_url=base_url(), api_key=key))
    return _connected[-1]


def get(client: openai.OpenAI, path: str, **params: Any) -> Any:
    """GET one of our extensions as plain JSON, with the client's own authentication and retries."""
    return _json(client.get(path, cast_to=object, options={"params": params}))


def post(client: openai.OpenAI, path: str, body: dict[str, Any]) -> Any:
    """POST to one of our extensions."""
    return _json(client.post(path, cast_to=object, body=body))


class _NotOursError(Exception):
    """Something answers there, but not this service."""


def _json(answer: Any) -> Any:
    if not isinstance(answer, dict | list):  # the client gives text that is no JSON as it came
        raise _NotOursError
    return answer


def print_refusal(error: VlmDftError) -> None:
    """What is wrong, and below it what helps."""
    print_error(error.message)
    if error.hint:
        err.print(Text(error.hint))


def print_error(text: str, *, word: str | None = None) -> None:
    """In red, or only the word before it. The text is shown as it is: brackets in it are no markup."""
    err.print(Text(text, "red") if word is None else Text.assemble((word, "red"), f" {text}"))


AsJson = Annotated[bool, typer.Option("--json", help="For programs: JSON on standard output, nothing else there.")]


def messages(as_json: bool) -> Console:
    """Where a command says what it does: with --json, standard output is the JSON's alone."""
    return err if as_json else out


def print_json(value: Any) -> None:
    """For programs: on standard output, and nothing else there."""
    print(json.dumps(value, ensure_ascii=False, indent=2))


@contextmanager
def readable_errors() -> Iterator[None]:
    """Turn the client's exceptions into one or two lines and an exit code, and close the client in the end."""
    try:
        yield
    except openai.APIConnectionError:
        said = f"No service answers at {base_url()}."
        print_error("Start one with `vlm-dft up`, or set OPENAI_BASE_URL.", word=said)
        raise typer.Exit(EXIT_UNREACHABLE) from None
    except _NotOursError:
        print_error(f"What answers at {base_url()} is no vlm-dft service: set OPENAI_BASE_URL, with /v1 at its end.")
        raise typer.Exit(EXIT_UNREACHABLE) from None
    except openai.APIStatusError as error:
        body = error.body if isinstance(error.body, dict) else {}
        print_error(body.get("message") or error.message)
        details = {"param": error.param, "code": error.code, "hint": body.get("hint"), "request": error.request_id}
        err.print(
            "  ".join(f"{name}={value}" for name, value in details.items() if value), highlight=False, markup=False
        )
        raise typer.Exit(EXIT_FAILED) from None
    finally:
        while _connected:
            _connected.pop().close()
