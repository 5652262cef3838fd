"""The FastAPI application: one router and one schema file per resource."""
