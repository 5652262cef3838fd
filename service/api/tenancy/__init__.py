"""Projects, API keys, usage and the audit log."""
