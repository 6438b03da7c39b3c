"""The pure function: imports JAX alone."""
