"""Evaluations of models on benchmarks, and the benchmarks that are there."""
