"""Layers, models and a `state_dict` for the tests of `jaxbn.convert`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from libraries import DECAY, C
from oracle import random_case

import jaxbn
from jaxbn import convert

ONES = np.ones(C, np.float32)
STATE_DICT = {
    f"{name}.{key}": np.float32(i + 1) * ONES
    for i, name in enumerate(("a", "b"))
    for key in ("weight", "bias", "running_mean", "running_var")
}
NAMES = {"a": "BatchNorm_0", "b": "BatchNorm_1"}


class LinenNet(nn.Module):
    """Apply two batch norms with tanh between them; initialize a dense layer too."""

    momentum: Any = DECAY
    epsilon: float = 1e-5
    unbiased: bool = False

    @nn.compact
    def __call__(self, x, train):
        for i in range(2):
            x = nn.tanh(x) if i else x
            x = jaxbn.linen.BatchNorm(
                not train,
                momentum=self.momentum,
                epsilon=self.epsilon,
                unbiased=self.unbiased,
            )(x)
        return nn.Dense(2)(x) if self.is_initializing() else x


class NnxNet(nnx.Module):
    """Apply the same two batch norms, at `BatchNorm_0` and `blocks/0`."""

    def __init__(self, **options):
        rngs = nnx.Rngs(0)
        self.BatchNorm_0 = jaxbn.nnx.BatchNorm(C, rngs=rngs, **options)
        self.blocks = nnx.List([jaxbn.nnx.BatchNorm(C, rngs=rngs, **options)])
        self.dense = nnx.Linear(C, 2, rngs=rngs)

    def __call__(self, x):
        return self.blocks[0](jnp.tanh(self.BatchNorm_0(x)))


def random_layer(rng, scale=True, bias=True, count=3) -> Any:
    """Return random `(params, state)` of C features."""
    case = random_case(rng, (1, C))._asdict()
    case = {name: jnp.asarray(a, jnp.float32) for name, a in case.items()}
    params = jaxbn.BatchNormParams(
        case["scale"] if scale else None, case["bias"] if bias else None
    )
    return params, jaxbn.BatchNormState(case["mean"], case["var"], jnp.int32(count))


def linen_variables(rng, **options) -> Any:
    """Return variables of `LinenNet` with two random layers."""
    x = jnp.zeros((1, C))
    variables = LinenNet(**options).init(jax.random.key(0), x, False)
    layers = {f"BatchNorm_{i}": random_layer(rng) for i in range(2)}
    return convert.replace_layers(variables, layers)
