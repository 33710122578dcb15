"""Scalability and speed, measured. Each module is a program: `python -m benchmarks.scaling --help`."""
