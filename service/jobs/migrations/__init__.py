"""Alembic's environment and versions; ``Database.upgrade()`` runs them."""
