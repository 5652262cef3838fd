"""The vlm-dft command."""
