"""Benchmarks of jaxbn versus other libraries: `python -m benchmarks`."""
