"""What operators ask: health, readiness, workers."""
