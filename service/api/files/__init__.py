"""Files: uploaded, or registered by server path."""
