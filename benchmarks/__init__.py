"""What jaxbn costs and what it buys, beside its peers: `python -m benchmarks`."""
