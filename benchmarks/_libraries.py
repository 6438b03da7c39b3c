"""The same layer in each JAX library, as pure functions.

A library is imported only when its layer is built, so all of them are optional.
"""

import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ._task import EPSILON, Task


class Layer(NamedTuple):
    """Hold a library's layer for one task; `params` and `state` are its own pytrees."""

    params: Any
    state: Any
    train: Callable[..., tuple[jax.Array, Any]]  # of params, state, x, maybe a mask
    inference: Callable[[Any, Any, jax.Array], jax.Array]
    read_params: Callable[[Any], Sequence]  # (scale, bias) of params, or their gradient
    read_state: Callable[[Any], Sequence]  # (mean, var)
    features_first: bool = False  # takes x as (N, C, ...) for every task


class Library(NamedTuple):
    """Hold the builder of a library's layer, and the module that it needs."""

    build: Callable[[Task], Layer]
    module: str


def jaxbn_function(task: Task) -> Layer:
    """Build a layer from `jaxbn.batch_norm`."""
    import jaxbn

    # The other libraries here keep the biased running variance.
    options = {"axis": task.axis, "momentum": task.momentum, "unbiased": False}
    return Layer(
        jaxbn.BatchNormParams(jnp.asarray(task.scale), jnp.asarray(task.bias)),
        jaxbn.BatchNormState(
            jnp.asarray(task.mean), jnp.asarray(task.var), jnp.zeros((), jnp.int32)
        ),
        lambda params, state, x, **more: jaxbn.batch_norm(
            params, state, x, True, **options, **more
        ),
        lambda params, state, x: jaxbn.batch_norm(params, state, x, False, **options)[
            0
        ],
        read_params=lambda params: params,
        read_state=lambda state: state[:2],
    )


def linen(module: str, **options: Any) -> Callable[[Task], Layer]:
    """Return the builder of `module.BatchNorm` with the interface of `flax.linen`."""

    def build(task: Task) -> Layer:
        layer = importlib.import_module(module).BatchNorm(
            axis=task.axis,
            momentum=task.momentum,
            epsilon=EPSILON,
            dtype=task.dtype,
            **options,
        )

        def train(
            params: Any, state: Any, x: jax.Array, **more: Any
        ) -> tuple[jax.Array, Any]:
            variables = {"params": params, "batch_stats": state}
            y, new = layer.apply(variables, x, False, mutable="batch_stats", **more)
            return y, new["batch_stats"]

        def inference(params: Any, state: Any, x: jax.Array) -> jax.Array:
            return layer.apply({"params": params, "batch_stats": state}, x, True)

        return Layer(
            {"scale": jnp.asarray(task.scale), "bias": jnp.asarray(task.bias)},
            {"mean": jnp.asarray(task.mean), "var": jnp.asarray(task.var)},
            train,
            inference,
            read_params=lambda params: (params["scale"], params["bias"]),
            read_state=lambda state: (state["mean"], state["var"]),
        )

    return build


def nnx(module: str) -> Callable[[Task], Layer]:
    """Return the builder of `module.BatchNorm` with the interface of `flax.nnx`.

    Each call merges the layer and splits it again.
    """

    def build(task: Task) -> Layer:
        from flax import nnx

        layer = importlib.import_module(module).BatchNorm(
            task.features,
            axis=task.axis,
            momentum=task.momentum,
            epsilon=EPSILON,
            dtype=jnp.dtype(task.dtype),
            rngs=nnx.Rngs(0),
        )
        for name in ("scale", "bias", "mean", "var"):
            getattr(layer, name).set_value(jnp.asarray(getattr(task, name)))
        graph, params, state = nnx.split(layer, nnx.Param, nnx.BatchStat)

        def train(params: Any, state: Any, x: jax.Array) -> tuple[jax.Array, Any]:
            layer = nnx.merge(graph, params, state, copy=True)
            y = layer(x, use_running_average=False)
            return y, nnx.state(layer, nnx.BatchStat)

        def inference(params: Any, state: Any, x: jax.Array) -> jax.Array:
            return nnx.merge(graph, params, state, copy=True)(
                x, use_running_average=True
            )

        return Layer(
            params,
            state,
            train,
            inference,
            read_params=lambda params: jax.tree.leaves(params)[::-1],  # bias, scale
            read_state=jax.tree.leaves,
        )

    return build


def haiku(task: Task) -> Layer:
    """Build `haiku.BatchNorm`; its variables are in x's dtype, as Haiku makes them."""
    hk = importlib.import_module("haiku")
    data_format = "NC..." if task.axis < task.x.ndim - 1 else "N...C"
    shape = [task.features if a == task.axis else 1 for a in range(task.x.ndim)]

    def layer(x: jax.Array, is_training: bool) -> jax.Array:
        norm = hk.BatchNorm(True, True, task.momentum, EPSILON, data_format=data_format)
        return norm(x, is_training)

    apply = hk.without_apply_rng(hk.transform_with_state(layer)).apply

    def vector(values: Any) -> jax.Array:
        return jnp.asarray(values, task.dtype).reshape(shape)

    def average(values: Any) -> dict[str, jax.Array]:
        counter = jnp.zeros((), jnp.int32)
        return {
            "average": vector(values),
            "hidden": vector(values),
            "counter": counter,
        }

    def read_params(params: Any) -> list[jax.Array]:
        scale_and_offset = params["batch_norm"]
        return [scale_and_offset[name].ravel() for name in ("scale", "offset")]

    def read_state(state: Any) -> list[jax.Array]:
        return [
            state[f"batch_norm/~/{name}_ema"]["average"].ravel()
            for name in ("mean", "var")
        ]

    return Layer(
        {"batch_norm": {"scale": vector(task.scale), "offset": vector(task.bias)}},
        {
            "batch_norm/~/mean_ema": average(task.mean),
            "batch_norm/~/var_ema": average(task.var),
        },
        lambda params, state, x: apply(params, state, x, True),
        lambda params, state, x: apply(params, state, x, False)[0],
        read_params,
        read_state,
    )


def equinox(task: Task) -> Layer:
    """Build `equinox.nn.BatchNorm`, which takes examples with features first."""
    eqx = importlib.import_module("equinox")
    layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
        task.features, "batch", EPSILON, momentum=task.momentum, mode="batch"
    )
    layer = eqx.tree_at(
        lambda layer: (layer.weight, layer.bias),
        layer,
        (jnp.asarray(task.scale), jnp.asarray(task.bias)),
    )
    index = layer.batch_state_index
    state = state.set(index, (jnp.asarray(task.mean), jnp.asarray(task.var)))
    params, static = eqx.partition(layer, eqx.is_array)

    def call(params: Any, state: Any, x: jax.Array, inference: bool) -> tuple:
        layer = eqx.nn.inference_mode(eqx.combine(params, static), inference)
        axes = (0, None)  # x and y are mapped, the state is shared
        y, state = jax.vmap(layer, axes, axes, axis_name="batch")(x, state)
        return y.astype(x.dtype), state  # equinox returns float32 for bfloat16

    return Layer(
        params,
        state,
        lambda params, state, x: call(params, state, x, False),
        lambda params, state, x: call(params, state, x, True)[0],
        read_params=lambda params: (params.weight, params.bias),
        read_state=lambda state: state.get(index),
        features_first=True,
    )


def keras(task: Task) -> Layer:
    """Build `keras.layers.BatchNormalization`, called statelessly."""
    keras = importlib.import_module("keras")
    layer = keras.layers.BatchNormalization(
        axis=task.axis,
        momentum=task.momentum,
        epsilon=EPSILON,
        dtype={"bfloat16": "mixed_bfloat16"}.get(task.dtype, task.dtype),
    )
    layer.build(task.x.shape)

    def call(params: Any, state: Any, x: jax.Array, training: bool) -> tuple:
        return layer.stateless_call(params, state, x, training=training)

    return Layer(
        [jnp.asarray(task.scale), jnp.asarray(task.bias)],
        [jnp.asarray(task.mean), jnp.asarray(task.var)],
        lambda params, state, x: call(params, state, x, True),
        lambda params, state, x: call(params, state, x, False)[0],
        read_params=lambda params: params,
        read_state=lambda state: state,
    )


LIBRARIES = {
    "jaxbn": Library(jaxbn_function, "jaxbn"),
    "jaxbn.linen": Library(linen("jaxbn.linen"), "flax"),
    "jaxbn.nnx": Library(nnx("jaxbn.nnx"), "flax"),
    "flax.linen": Library(linen("flax.linen"), "flax"),
    "flax.nnx": Library(nnx("flax.nnx"), "flax"),
    "dm-haiku": Library(haiku, "haiku"),
    "equinox": Library(equinox, "equinox"),
    "keras": Library(keras, "keras"),
}


def available(names: Sequence[str]) -> tuple[dict[str, Library], dict[str, str]]:
    """Return the libraries that can be imported, and why the others cannot."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    found, missing = {}, {}
    for name in names:
        try:
            importlib.import_module(LIBRARIES[name].module)
            found[name] = LIBRARIES[name]
        except ImportError as error:
            missing[name] = str(error)
    return found, missing
