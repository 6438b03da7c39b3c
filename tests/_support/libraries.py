"""The same small network in each library that jaxbn converts from and to.

`depth` batch norms with tanh between them, on x of shape (N, C). Each network trains in
place, runs inference, and is read and written through `jaxbn.convert`.
"""

import atexit
import os
import shutil
import tempfile
from typing import Any

# Keras writes a file when it is imported; keep it out of the home directory.
os.environ["KERAS_BACKEND"] = "jax"
os.environ["KERAS_HOME"] = tempfile.mkdtemp(prefix="jaxbn-keras-")

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest

from jaxbn import convert

atexit.register(shutil.rmtree, os.environ["KERAS_HOME"])
C = 3
DECAY = 0.9


def interleaved(norms, tanh):
    """Insert a tanh between consecutive norms."""
    return [layer for norm in norms for layer in (tanh, norm)][1:]


class Library:
    """Define the interface that the tests use."""

    epsilon = 1e-5
    unbiased = False
    counts = True
    names: dict[str, str]

    def momentum(self, count: int) -> float:
        """Return jaxbn's momentum for this library's step after `count` batches."""
        return DECAY

    def named(self, *names):
        return {name: f"BatchNorm_{i}" for i, name in enumerate(names)}


class Torch(Library):
    unbiased = True

    def __init__(self, depth=1, scale=True, bias=True):
        self.torch: Any = pytest.importorskip("torch")
        nn = self.torch.nn
        options: Any = {"affine": scale, "bias": bias}
        self.norms = [
            nn.BatchNorm1d(C, momentum=1 - DECAY, **options) for _ in range(depth)
        ]
        self.net = nn.Sequential(*interleaved(self.norms, nn.Tanh()))
        self.names = self.named(*(str(2 * i) for i in range(depth)))

    def train(self, x):
        self.net.train()(self.torch.tensor(x))

    def infer(self, x):
        return self.net.eval()(self.torch.tensor(x)).detach().numpy()

    def read(self):
        return convert.from_torch(self.norms[0].state_dict())

    def write(self, params, state):
        arrays = convert.to_torch(params, state)
        tensors = {k: self.torch.from_numpy(v) for k, v in arrays.items()}
        self.norms[0].load_state_dict(tensors)

    def read_tree(self, variables):
        return convert.from_torch_tree(self.net.state_dict(), self.names, variables)

    def write_tree(self, variables, count):
        old = self.net.state_dict()
        self.net.load_state_dict(convert.to_torch_tree(variables, self.names, old))


class Keras(Library):
    epsilon = 1e-3
    counts = False

    def __init__(self, depth=1, scale=True, bias=True):
        options: Any = {"momentum": DECAY, "scale": scale, "center": bias}
        self.norms = [
            keras.layers.BatchNormalization(name=f"norm_{i}", **options)
            for i in range(depth)
        ]
        tanh = keras.layers.Activation("tanh")
        self.net = keras.Sequential(interleaved(self.norms, tanh), name="net")
        self.net.build((None, C))
        self.names = self.named(*(f"net/norm_{i}" for i in range(depth)))

    def train(self, x):
        self.net(x, training=True)

    def infer(self, x):
        return self.net(x, training=False)

    def read(self):
        layer = self.norms[0]
        by_name = convert.from_keras({w.name: w for w in layer.weights})
        by_place = convert.from_keras(
            layer.get_weights(), scale=layer.scale, center=layer.center
        )
        jax.tree.map(np.testing.assert_array_equal, by_name, by_place)
        return by_name

    def write(self, params, state):
        self.norms[0].set_weights(list(convert.to_keras(params, state).values()))

    def read_tree(self, variables):
        return convert.from_keras_tree(self._weights(), self.names, variables)

    def write_tree(self, variables, count):
        new = convert.to_keras_tree(variables, self.names, self._weights())
        for weight in self.net.weights:
            weight.assign(new[weight.path])

    def _weights(self):
        return {weight.path: weight for weight in self.net.weights}


class Haiku(Library):
    def __init__(self, depth=1, scale=True, bias=True):
        def net(x, train):
            for i in range(depth):
                x = jnp.tanh(x) if i else x
                x = hk.BatchNorm(scale, bias, DECAY, name=f"norm_{i}")(x, train)
            return x

        init, self.apply = hk.transform_with_state(net)
        self.params, self.state = init(None, jnp.zeros((1, C)), True)
        self.names = self.named(*(f"norm_{i}" for i in range(depth)))

    def momentum(self, count):
        return convert.debiased_momentum(DECAY, count)

    def train(self, x):
        _, self.state = self.apply(self.params, self.state, None, x, True)

    def infer(self, x):
        return self.apply(self.params, self.state, None, x, False)[0]

    def read(self):
        return convert.from_haiku(self.params, self.state)

    def write(self, params, state):
        params, state = convert.to_haiku(params, state, decay=DECAY, ndim=2)
        self.params = {"norm_0": params} if params else {}
        self.state = {f"norm_0/{key}": value for key, value in state.items()}

    def read_tree(self, variables):
        return convert.from_haiku_tree(self.params, self.state, self.names, variables)

    def write_tree(self, variables, count):
        self.params, self.state = convert.to_haiku_tree(
            variables, self.names, self.params, self.state, decay=DECAY, count=count
        )


class Equinox(Library):
    mode: Any = "batch"

    def __init__(self, depth=1, scale=True, bias=True):
        options: Any = {"momentum": DECAY, "mode": self.mode}

        def make():
            norms = [
                eqx.nn.BatchNorm(C, "rows", channelwise_affine=scale, **options)
                for _ in range(depth)
            ]
            return eqx.nn.Sequential(interleaved(norms, eqx.nn.Lambda(jnp.tanh)))

        assert scale == bias
        self.net, self.state = eqx.nn.make_with_state(make)()
        self.names = self.named(*(f"layers/{2 * i}" for i in range(depth)))

    def momentum(self, count):
        return convert.debiased_momentum(DECAY, count)

    def train(self, x):
        _, self.state = self._run(self.net, x)

    def infer(self, x):
        return self._run(eqx.nn.inference_mode(self.net), x)[0]

    def _run(self, net, x):
        state = jax.tree.map(lambda a: a, self.state)  # `set` invalidates the old state
        return jax.vmap(net, axis_name="rows", in_axes=(0, None), out_axes=(0, None))(
            x, state
        )

    def read(self):
        return convert.from_equinox(self.net.layers[0], self.state)

    def write(self, params, state):
        layer, self.state = convert.to_equinox(
            params, state, self.net.layers[0], self.state
        )
        self.net = eqx.tree_at(lambda net: net.layers[0], self.net, layer)

    def read_tree(self, variables):
        return convert.from_equinox_tree(self.net, self.state, self.names, variables)

    def write_tree(self, variables, count):
        self.net, self.state = convert.to_equinox_tree(
            variables, self.names, self.net, self.state, count=count
        )


class EquinoxEma(Equinox):
    mode = "ema"
    counts = False

    def momentum(self, count):
        return DECAY


LIBRARIES: dict[str, Any] = {
    library.__name__: library for library in (Torch, Keras, Haiku, Equinox, EquinoxEma)
}
