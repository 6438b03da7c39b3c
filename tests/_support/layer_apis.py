"""One interface to the layers of linen and nnx, jaxbn's and Flax's."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from flax_helpers import randomize

import jaxbn


class LinenLayer:
    """Hold a linen layer and its variables."""

    def __init__(self, library: str, shape=(8, 3), **options):
        norms = {
            "jaxbn": jaxbn.linen.BatchNorm,
            "renorm": jaxbn.linen.BatchRenorm,
            "flax": nn.BatchNorm,
        }
        self.layer = norms[library](**options)
        self.variables: Any = self.layer.init(jax.random.key(0), jnp.zeros(shape), True)

    @property
    def stats(self) -> dict[str, jax.Array]:
        return self.variables["batch_stats"]

    def randomize(self, rng) -> None:
        self.variables = randomize(rng, self.variables)

    def apply(self, variables, x, train=True, **options) -> Any:
        """Return y and the new statistics, as a pure function."""
        y, updates = self.layer.apply(
            variables, x, not train, **options, mutable=["batch_stats"]
        )
        return y, updates["batch_stats"]

    def __call__(self, x, train=True, **options) -> jax.Array:
        """Return y, and keep the new statistics."""
        y, stats = self.apply(self.variables, x, train, **options)
        self.variables |= {"batch_stats": stats}
        return y


class NnxLayer:
    """Hold an nnx layer, split into its graph and its variables."""

    def __init__(self, library: str, shape=(8, 3), **options):
        norms = {
            "jaxbn": jaxbn.nnx.BatchNorm,
            "renorm": jaxbn.nnx.BatchRenorm,
            "flax": nnx.BatchNorm,
        }
        features = shape[options.get("axis", -1)]
        layer = norms[library](features, rngs=nnx.Rngs(0), **options)
        self.graphdef, self.variables = nnx.split(layer)

    @property
    def stats(self) -> dict[str, jax.Array]:
        layer = nnx.merge(self.graphdef, self.variables)
        return nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat))

    def randomize(self, rng) -> None:
        self.variables = randomize(rng, self.variables)

    def apply(self, variables, x, train=True, **options) -> Any:
        """Return y and the new statistics, as a pure function."""
        layer = nnx.merge(self.graphdef, variables)
        y = layer(x, use_running_average=not train, **options)
        return y, nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat))

    def __call__(self, x, train=True, **options) -> jax.Array:
        """Return y, and keep the new statistics."""
        layer = nnx.merge(self.graphdef, self.variables)
        y = layer(x, use_running_average=not train, **options)
        self.variables = nnx.state(layer)
        return y


APIS = {"linen": LinenLayer, "nnx": NnxLayer}
