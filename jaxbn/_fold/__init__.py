"""Folding of a whole model by tracing one call; imports no Flax."""
