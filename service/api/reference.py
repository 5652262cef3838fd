"""``python -m service.api.reference``: docs/api.md from the OpenAPI document, so that the two cannot disagree.

A test compares the file with what this prints. Knows no resource.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from service.api.app import create_app
from service.settings import Settings

_BOUNDS: Final = (
    ({"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}, ""),
    ({"minItems": "at least", "maxItems": "at most"}, " of them"),
    ({"maxLength": "at most"}, " characters"),
)
"""JSON Schema's names of bounds in words, and what they count."""
_NO_BOUND: Final = 2**53
"""The largest whole number that JSON carries: no bound that anybody meets."""

PATH = Path(__file__).parent.parent.parent / "docs" / "api.md"
_HEAD = """# API reference

Made from the service's own OpenAPI document (`GET /openapi.json`) by `python -m service.api.reference`; a test keeps
the two alike. What OpenAI's client calls has OpenAI's names; everything else is an extension, reached with the client's
`get` and `post`.

Every request but those for health needs `Authorization: Bearer <key>`, unless the service runs on loopback without
keys. Every answer has an `x-request-id`; an error is `{"error": {"message", "type", "param", "code"}}` and says in
`x-should-retry` whether to repeat the request. A form's fields mean what they mean in CreateUpload.
"""


def reference() -> str:
    """The whole file."""
    with tempfile.TemporaryDirectory() as directory:
        app = create_app(Settings(data_dir=Path(directory)))
        document = app.openapi()
        app.state.database.close()
    return "\n".join([_HEAD, *_routes(document), *_bodies(document)]).rstrip() + "\n"


def _routes(document: dict[str, Any]) -> Iterator[str]:
    by_tag: dict[str, list[str]] = {}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            tag = (operation.get("tags") or ["other"])[0]
            text = _one_line(operation.get("description") or operation.get("summary") or "")
            query = ", ".join(f"`{each['name']}`" for each in operation.get("parameters", []) if each["in"] == "query")
            body = _body_of(operation)
            by_tag.setdefault(tag, []).append(f"| `{method.upper()} {path}` | {body} | {query} | {text} |")
    for tag, rows in by_tag.items():
        lines: list[str] = [f"## {tag}", "", "| request | body | query | |", "|---|---|---|---|", *rows, ""]
        yield from lines


def _body_of(operation: dict[str, Any]) -> str:
    content = operation.get("requestBody", {}).get("content", {})
    schema = next(iter(content.values()), {}).get("schema", {})
    if "properties" in schema:
        return "form: " + ", ".join(f"`{name}`" for name in schema["properties"])
    name = _name_of(schema)
    return f"[{name}](#{name.lower()})" if name else ""


def _bodies(document: dict[str, Any]) -> Iterator[str]:
    """The fields of everything that can be sent, and of what those hold."""
    schemas = document["components"]["schemas"]
    yield from ("## Request bodies", "")
    for name in sorted(_sent(document, schemas)):
        schema = schemas[name]
        if "properties" not in schema:
            continue
        required = set(schema.get("required", []))
        yield from (
            f"### {name}",
            "",
            _one_line(schema.get("description", "")),
            "",
            "| field | type | |",
            "|---|---|---|",
        )
        for field, part in schema["properties"].items():
            mark = " (required)" if field in required else ""
            told = " ".join(filter(None, [described(part), _limits(part), _default(part)]))
            yield f"| `{field}`{mark} | {_type_of(part)} | {told} |"
        yield ""


def described(part: dict[str, Any]) -> str:
    """The field's documentation: its own, or that of its type."""
    texts = [each.get("description", "") for each in (part, *part.get("anyOf", []))]
    return _one_line(next(filter(None, texts), ""))


def _default(part: dict[str, Any]) -> str:
    """Of an object the defaults stand with its type."""
    value = part.get("default")
    return "" if value is None or isinstance(value, list | dict) else f"Default: `{json.dumps(value)}`."


def _limits(part: dict[str, Any]) -> str:
    """Bounds of the value, its length, or how many it may be; of the first branch that has any."""
    for words, unit in _BOUNDS:
        for each in (part, *part.get("anyOf", []), part.get("items", {})):
            known = {name: word for name, word in words.items() if abs(each.get(name, _NO_BOUND)) < _NO_BOUND}
            if known:
                bounds = [f"{word} {_number(each[name])}" for name, word in known.items()]
                return f"{' and '.join(bounds).capitalize()}{unit}."
    return ""


def _number(value: float) -> str:
    return f"{int(value):,}" if value == int(value) else f"{value:g}"


def _sent(document: dict[str, Any], schemas: dict[str, Any]) -> set[str]:
    found: set[str] = set()
    waiting = [
        _name_of(content.get("schema", {}))
        for methods in document["paths"].values()
        for operation in methods.values()
        for content in operation.get("requestBody", {}).get("content", {}).values()
    ]
    while waiting:
        name = waiting.pop()
        if name and name not in found:
            found.add(name)
            waiting += re.findall(r"#/components/schemas/([^'\"]+)", str(schemas[name]))
    return found


def _name_of(schema: dict[str, Any]) -> str:
    return schema.get("$ref", "").rpartition("/")[2]


def _type_of(part: dict[str, Any]) -> str:
    if name := _name_of(part):
        return f"[{name}](#{name.lower()})"
    for many in ("anyOf", "oneOf", "allOf"):
        if many in part:
            texts = [text for each in part[many] if (text := _type_of(each)) != "null"]
            return " or ".join(sorted(set(texts), key=texts.index))
    if "enum" in part or "const" in part:
        return " or ".join(f"`{value}`" for value in part.get("enum", [part.get("const")]))
    if part.get("type") == "array":
        return f"list of {_type_of(part.get('items', {}))}"
    return str(part.get("type", "any"))


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(reference(), encoding="utf-8")
