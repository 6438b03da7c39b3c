"""Shared by `jaxbn.linen` and `jaxbn.nnx`; imports no Flax."""
