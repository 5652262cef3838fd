"""Report cards: what a finished job is worth, and whether it passes its owner's thresholds."""
