"""python -m benchmarks NAME: one JSON line with a ratio measured in one run."""
