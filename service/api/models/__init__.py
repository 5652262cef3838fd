"""Base models and fine-tuned models."""
