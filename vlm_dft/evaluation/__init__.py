"""Benchmarks: loaders, generation, rule-based scoring, score records."""
