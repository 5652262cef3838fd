"""Comparisons: fine-tunings on equal terms, side by side."""
