"""Layers, models and a `state_dict` for the tests of `jaxbn.convert`."""

from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from libraries import DECAY, C, keras
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


# Models of one layer, in each library, for inputs with features last.


class TorchLayer:
    """Run, read and write a PyTorch layer with random weights."""

    name = "0"

    def __init__(self, make, rng, x):
        self.torch: Any = pytest.importorskip("torch")
        self.net = self.torch.nn.Sequential(make(self.torch.nn))
        self.randomize(rng)

    def randomize(self, rng):
        for value in self.net.state_dict().values():
            value.copy_(self.torch.tensor(rng.normal(size=value.shape)))

    def weights(self):
        return {k: v.numpy().copy() for k, v in self.net.state_dict().items()}

    def infer(self, x):
        x = np.moveaxis(x, -1, 1) if x.ndim > 1 else x
        y = self.net(self.torch.tensor(x)).detach().numpy()
        return np.moveaxis(y, 1, -1)

    def read(self, names, variables):
        return convert.from_torch_tree(self.net.state_dict(), names, variables)

    def write(self, variables, names):
        old = self.net.state_dict()
        self.net.load_state_dict(convert.to_torch_tree(variables, names, old))


class KerasLayer:
    """Run, read and write a Keras layer with random weights."""

    def __init__(self, make, rng, x):
        layer = make(keras.layers)
        self.net = keras.Sequential([layer], name="net")
        self.net(x)
        self.name = f"net/{layer.name}"
        self.randomize(rng)

    def randomize(self, rng):
        for weight in self.net.weights:
            weight.assign(rng.normal(size=weight.shape))

    def weights(self):
        return {weight.path: np.array(weight) for weight in self.net.weights}

    def infer(self, x):
        return self.net(x)

    def read(self, names, variables):
        return convert.from_keras_tree(self._variables(), names, variables)

    def write(self, variables, names):
        new = convert.to_keras_tree(variables, names, self._variables())
        for weight in self.net.weights:
            weight.assign(new[weight.path])

    def _variables(self):
        return {weight.path: weight for weight in self.net.weights}


class HaikuLayer:
    """Run, read and write a haiku layer with random weights."""

    name = "layer"

    def __init__(self, make, rng, x):
        init, self.apply = hk.without_apply_rng(hk.transform(lambda x: make(hk)(x)))
        self.params = init(jax.random.key(0), x)
        self.randomize(rng)

    def randomize(self, rng):
        self.params = random_like(rng, self.params)

    def weights(self):
        return self.params

    def infer(self, x):
        return self.apply(self.params, x)

    def read(self, names, variables):
        return convert.from_haiku_tree(self.params, {}, names, variables)

    def write(self, variables, names):
        new = convert.to_haiku_tree(variables, names, self.params, {}, decay=DECAY)
        self.params, state = new
        assert state == {}


class EquinoxLayer:
    """Run, read and write an equinox layer with random weights."""

    name = "layers/0"

    def __init__(self, make, rng, x):
        def model():
            return eqx.nn.Sequential([make(eqx.nn, key=jax.random.key(0))])

        self.net, self.state = eqx.nn.make_with_state(model)()
        self.randomize(rng)

    def randomize(self, rng):
        arrays, rest = eqx.partition(self.net, eqx.is_inexact_array)
        self.net = eqx.combine(random_like(rng, arrays), rest)

    def weights(self):
        return jax.tree.leaves(eqx.filter(self.net, eqx.is_inexact_array))

    def infer(self, x):
        x = np.moveaxis(x, -1, 1) if x.ndim > 1 else x
        return np.moveaxis(np.asarray(jax.vmap(self.net)(x)), 1, -1)

    def read(self, names, variables):
        return convert.from_equinox_tree(self.net, self.state, names, variables)

    def write(self, variables, names):
        self.net, self.state = convert.to_equinox_tree(
            variables, names, self.net, self.state
        )


def random_like(rng, tree) -> Any:
    """Return random arrays of the same shapes, in float32."""
    return jax.tree.map(
        lambda a: jnp.asarray(rng.normal(size=a.shape), jnp.float32), tree
    )
