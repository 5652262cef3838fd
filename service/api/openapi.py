"""What the OpenAPI says beyond the routes themselves, and what it says about a path.

Every path under /v1, and /metrics, asks for a key: Authentication checks it before a route is chosen, and a dependency
of every route that only declares it would cost each request something. Every error is JSON, whatever the route's own
answer is.
"""

from __future__ import annotations

import re
from typing import Any, Final

from fastapi import FastAPI

_GUARDED = ("/v1/", "/metrics")
_SCHEME = "HTTPBearer"
_JSON: Final = "application/json"
_WHOLE_REST: Final = ("model",)
"""Parameters that take slashes too."""
_KEY = {
    "type": "http",
    "scheme": "bearer",
    "description": "Needed unless the service runs on loopback without keys.",
}


def complete_schema(app: FastAPI) -> None:
    """Add to the schema that the app's routes make."""
    plain = app.openapi

    def with_keys() -> dict[str, Any]:
        schema = plain()
        schema.setdefault("components", {}).setdefault("securitySchemes", {})[_SCHEME] = _KEY
        for path, operations in schema["paths"].items():
            if path.startswith(_GUARDED):
                for operation in operations.values():
                    operation["security"] = [{_SCHEME: []}]
            for operation in operations.values():
                _errors_are_json(operation["responses"])
        return schema

    app.openapi = with_keys  # the framework's own way to change its schema


def _errors_are_json(responses: dict[str, Any]) -> None:
    for status, response in responses.items():
        content = response.get("content", {})
        if status[0] in "45" and content and _JSON not in content:
            response["content"] = {_JSON: next(iter(content.values()))}


def allowed_methods(app: FastAPI, path: str) -> list[str]:
    """What the path may be asked with, over all routes that serve it: a router's own answer knows only the first."""
    paths = app.openapi()["paths"]
    found = [operations for template, operations in paths.items() if template == path]
    found = found or [operations for template, operations in paths.items() if _pattern(template).fullmatch(path)]
    return sorted({method.upper() for operations in found for method in operations})


def _pattern(template: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", template)
    names = [".+" if name in _WHOLE_REST else "[^/]+" for name in parts[1::2]]
    literals = [re.escape(literal) for literal in parts[::2]]
    return re.compile("".join(literal + name for literal, name in zip(literals, [*names, ""], strict=True)))
