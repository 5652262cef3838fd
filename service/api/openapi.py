"""What the OpenAPI says beyond the routes themselves: every path under /v1 asks for a key.

Authentication checks the key before a route is chosen; a dependency of every route that only declares it would cost
each request something.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

_GUARDED = "/v1/"
_SCHEME = "HTTPBearer"
_KEY = {
    "type": "http",
    "scheme": "bearer",
    "description": "Needed unless the service runs on loopback without keys.",
}


def declare_keys(app: FastAPI) -> None:
    """Add the scheme to the schema that the app's routes make."""
    plain = app.openapi

    def with_keys() -> dict[str, Any]:
        schema = plain()
        schema.setdefault("components", {}).setdefault("securitySchemes", {})[_SCHEME] = _KEY
        for path, operations in schema["paths"].items():
            if path.startswith(_GUARDED):
                for operation in operations.values():
                    operation["security"] = [{_SCHEME: []}]
        return schema

    app.openapi = with_keys  # the framework's own way to change its schema
