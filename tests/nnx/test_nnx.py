"""`jaxbn.nnx`: the layer beside Flax's, and its replacement in existing models.

Tests that linen and nnx share are in `tests/layers/test_layers.py`.
"""

import inspect
import pickle
from copy import deepcopy
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax_helpers import assert_same, everything, randomize
from jax import Array

from jaxbn.nnx import BatchNorm, replace_batch_norm, restore_batch_norm

pytestmark = pytest.mark.usefixtures("standard_promotion")
C = 3
NORMS = (BatchNorm, nnx.BatchNorm)


@pytest.fixture
def x(rng):
    return jnp.asarray(0.7 + 1.9 * rng.normal(size=(8, C)), jnp.float32)


def make(norm: type[nnx.BatchNorm] = BatchNorm, **options) -> Any:
    """Return a layer with random variables, the same in each call."""
    layer = norm(C, rngs=nnx.Rngs(0), **options)
    state = nnx.state(layer)
    nnx.update(layer, randomize(np.random.default_rng(1), state))
    return layer


def stats_of(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))


# The same as Flax.


def test_arguments_and_defaults_are_flax_s():
    assert issubclass(BatchNorm, nnx.BatchNorm)
    actual, expected = (
        {
            name: (repr(p.default).partition(" at ")[0], p.kind)
            for name, p in inspect.signature(norm.__init__).parameters.items()
        }
        for norm in NORMS
    )
    keyword = inspect.Parameter.KEYWORD_ONLY
    jaxbn_only = {"unbiased": ("False", keyword), "autodiff": ("'custom_vjp'", keyword)}
    jaxbn_only |= {"virtual_batch_size": ("None", keyword)}
    assert actual == expected | jaxbn_only


def test_variables_and_metadata_match_flax():
    options: dict[str, Any] = {
        "scale_init": nnx.initializers.normal(),
        "bias_init": nnx.initializers.normal(),
        "scale_metadata": {"note": "scale"},
        "bias_metadata": {"note": "bias"},
        "param_dtype": jnp.bfloat16,
    }
    actual, expected = (nnx.state(n(C, rngs=nnx.Rngs(1), **options)) for n in NORMS)
    assert_same(actual, expected, 0)
    assert actual["scale"].note == "scale"
    assert actual["bias"].note == "bias"


def test_train_eval_and_view_set_the_mode(x):
    layer, flax = make(), make(nnx.BatchNorm)
    for layers in (
        (layer, flax),
        [n.eval() or n for n in (layer, flax)],
        [nnx.view(n, use_running_average=False) for n in (layer, flax)],
        [n.train() or n for n in (layer, flax)],
    ):
        actual, expected = (n(x) for n in layers)
        assert_same(actual, expected, 1e-5)
        assert_same(stats_of(layer), stats_of(flax), 1e-5)
    assert_same(layer(x, use_running_average=True), flax(x, True), 1e-5)


def test_mode_must_be_given(x):
    with pytest.raises(ValueError, match="use_running_average must be given"):
        make(use_running_average=None)(x)


def test_copies_are_independent(x):
    layer = make()
    expected = layer(x, use_running_average=True)
    for copy in (nnx.clone(layer), deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(copy) is BatchNorm
        assert_same(copy(x, use_running_average=True), expected, 0)
        copy(x)
    assert_same(layer(x, use_running_average=True), expected, 0)


def test_summary_matches_flax(x):
    actual, expected = (nnx.tabulate(make(norm), x) for norm in NORMS)
    assert actual == expected


class Block(nnx.Module):
    def __init__(self, norm, rngs: nnx.Rngs, **options):
        self.norm = norm(C, rngs=rngs, **options)
        self.dense = nnx.Linear(C, C, rngs=rngs)

    def __call__(self, x):
        return jnp.tanh(self.dense(self.norm(x)))


def four_blocks(norm):
    """Return blocks whose variables are stacked along a new leading axis."""

    @nnx.split_rngs(splits=4)
    @nnx.vmap
    def build(rngs):
        return Block(norm, rngs)

    return build(nnx.Rngs(0))


def mapped(norm, x):
    blocks = four_blocks(norm)
    y = nnx.vmap(lambda block, x: block(x))(blocks, x)
    return y, nnx.state(blocks)


def synchronized(norm, x):
    block = Block(norm, nnx.Rngs(0), axis_name="batch")
    axes = nnx.StateAxes({...: None})
    y = nnx.vmap(lambda b, x: b(x), in_axes=(axes, 0), axis_name="batch")(block, x)
    return y, nnx.state(block)


def scanned_layers(norm, x):
    blocks = four_blocks(norm)
    y = nnx.scan(lambda x, b: b(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
        x[0], blocks
    )
    return y, nnx.state(blocks)


def scanned_steps(norm, x):
    block = Block(norm, nnx.Rngs(0))

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def step(block, x):
        return block, block(x)

    block, y = step(block, x)
    return y, nnx.state(block)


def rematerialized(norm, x):
    block = Block(norm, nnx.Rngs(0))

    def loss(block, x):
        return (nnx.remat(lambda b, x: b(x))(block, x) ** 2).sum()

    return nnx.grad(loss)(block, x[0]), nnx.state(block)


def chosen(norm, x):
    block = Block(norm, nnx.Rngs(0))
    y = nnx.cond(x.sum() < 1e9, lambda b, x: b(x), lambda b, x: 2 * b(x), block, x[0])
    return y, nnx.state(block)


def trained(norm, x):
    """Take three jitted steps of SGD."""
    block = Block(norm, nnx.Rngs(0))
    optimizer = nnx.Optimizer(block, optax.sgd(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(block, optimizer, x):
        loss, grads = nnx.value_and_grad(lambda b: ((b(x) - 0.3) ** 2).sum())(block)
        optimizer.update(block, grads)
        return loss

    losses = [step(block, optimizer, x[i]) for i in range(3)]
    return jnp.stack(losses), nnx.state(block)


@pytest.mark.parametrize(
    "transform",
    [
        mapped,
        synchronized,
        scanned_layers,
        scanned_steps,
        rematerialized,
        chosen,
        trained,
    ],
)
def test_transformations_match_flax(transform, rng):
    x = jnp.asarray(rng.normal(size=(4, 8, C)), jnp.float32)
    actual, expected = (transform(norm, x) for norm in NORMS)
    assert_same(actual, expected, 2e-5)


def test_promote_dtype_is_used(x):
    """It is called as by Flax's layer, and its x, scale and bias are used."""
    seen = []

    def promote(values, /, *, dtype=None, inexact=True):
        seen.append([v.dtype for v in values])
        x, mean, var, scale, bias = values
        return x.astype(jnp.bfloat16), mean, var, 2 * scale, bias.astype(dtype)

    options = {"promote_dtype": promote, "dtype": jnp.bfloat16}
    actual, expected = (make(norm, **options)(x) for norm in NORMS)
    assert_same(actual, expected, 3e-2)
    assert seen == 2 * [5 * [jnp.float32]]
    assert float(jnp.abs(make(dtype=jnp.bfloat16)(x) - actual).max()) > 0.1


# Statistics.


def test_inference_in_bfloat16_does_not_round_the_statistics(rng):
    x = jnp.asarray(100.3 + rng.normal(size=(64, C)), jnp.bfloat16)
    mean, var = np.full(C, 100.3, np.float32), np.full(C, 1.7, np.float32)
    layer = BatchNorm(C, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    layer.mean[...], layer.var[...] = jnp.asarray(mean), jnp.asarray(var)
    layer.eval()
    expected = (np.asarray(x, np.float64) - mean) / np.sqrt(var + 1e-5)
    y = layer(x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, atol=1e-2)


def test_statistics_have_no_gradient_as_in_flax(x):
    def loss(layer):
        layer(x)
        return layer.mean[...].sum() + layer.var[...].sum()

    actual, expected = (nnx.grad(loss)(make(norm)) for norm in NORMS)
    assert_same(actual, expected, 0)


# Replace and restore.


class Scaled(nnx.BatchNorm):
    """A subclass of Flax's layer."""


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        def norm():
            return nnx.BatchNorm(C, momentum=0.8, rngs=rngs)

        self.first = norm()
        self.listed = nnx.List([norm(), nnx.Linear(C, C, rngs=rngs)])
        self.named = nnx.Dict(a=norm(), b=nnx.Dict(c=norm()))
        self.rest = nnx.Sequential(nnx.Linear(C, C, rngs=rngs), norm())
        self.own = Scaled(C, rngs=rngs)
        self.shared = self.first

    def __call__(self, x) -> Array:
        named: Any = self.named
        layers: Any = (self.first, *self.listed, named.a, named.b.c, self.rest)
        for layer in (*layers, self.own, self.shared):
            x = layer(x)
        return x


def model() -> Any:
    return Model(nnx.Rngs(0))


def run(model, x):
    graphdef, *state = nnx.split(model, nnx.Param, ...)

    def step(params, rest, x):
        model = nnx.merge(graphdef, params, rest)
        return model(x), nnx.state(model, nnx.BatchStat)

    return jax.jit(partial(everything, step))(*state, x)


def test_replace_computes_as_jaxbn_and_restore_as_flax(x):
    swapped, flax = model(), model()
    replaced = replace_batch_norm(swapped)
    assert_same(run(replaced, x)[0], run(flax, x)[0], 1e-4)
    far = x + 1e4
    np.testing.assert_allclose(swapped.first(far).std(0), 1, rtol=1e-4)
    with pytest.raises(AssertionError):
        assert_same(flax.first(far), swapped.first(far), 1e-1)
    restored = restore_batch_norm(swapped)
    nnx.update(restored, nnx.state(flax))
    assert_same(run(restored, x), run(flax, x), 0)
    assert nnx.graphdef(restored) == nnx.graphdef(flax)


def test_replace_keeps_layers_and_variables(x):
    before = model()
    layers = [node for _, node in nnx.iter_graph(before)]
    assert replace_batch_norm(before) is before
    after = [node for _, node in nnx.iter_graph(before)]
    kept = (nnx.Module, nnx.Variable)
    assert [id(n) for n in after if isinstance(n, kept)] == [
        id(n) for n in layers if isinstance(n, kept)
    ]
    named: Any = before.named
    places = (before.first, before.listed[0], named.a, named.b.c, before.rest.layers[1])
    assert {type(layer) for layer in places} == {BatchNorm}
    assert before.shared is before.first
    assert isinstance(before.own, Scaled)
    assert isinstance(before.own, BatchNorm)


def test_replaced_layer_has_the_graph_of_a_jaxbn_layer():
    replaced = replace_batch_norm(nnx.BatchNorm(C, momentum=0.8, rngs=nnx.Rngs(0)))
    layer = BatchNorm(C, momentum=0.8, rngs=nnx.Rngs(0))
    assert nnx.graphdef(replaced) == nnx.graphdef(layer)
    assert replace_batch_norm(layer) is layer


def test_replace_and_restore_accept_lists_and_dicts():
    models = {"a": [model(), model()], "b": model()}
    replace_batch_norm(models)
    assert {type(m.first) for m in (*models["a"], models["b"])} == {BatchNorm}
    restore_batch_norm(models)
    assert {type(m.first) for m in (*models["a"], models["b"])} == {nnx.BatchNorm}


def test_replace_keeps_compiled_function_and_optimizer_valid(x):
    trained_model = model()
    optimizer = nnx.Optimizer(trained_model, optax.sgd(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        grads = nnx.grad(lambda model: ((model(x) - 0.3) ** 2).sum())(model)
        optimizer.update(model, grads)
        return model.first(1e4 + x, use_running_average=False).std()

    stds = [step(trained_model, optimizer, x)]
    replace_batch_norm(trained_model)
    stds.append(step(trained_model, optimizer, x))
    assert abs(stds[0] - 1) > 0.1  # Flax's variance cancelled
    scale = trained_model.first.scale[...]
    expected = np.sqrt(np.mean(np.asarray(scale) ** 2))
    np.testing.assert_allclose(stds[1], expected, rtol=0.1)


def test_replace_passes_autodiff_on_and_restore_removes_it(x):
    def tangents(layer):
        graphdef, state = nnx.split(layer)
        return jax.jvp(lambda x: nnx.merge(graphdef, state)(x), (x,), (jnp.cos(x),))

    layer, flax = (make(nnx.BatchNorm, use_running_average=True) for _ in range(2))
    replace_batch_norm(layer, autodiff="jax")
    assert_same(tangents(layer), tangents(flax), 1e-5)
    assert nnx.graphdef(restore_batch_norm(layer)) == nnx.graphdef(flax)


@pytest.mark.usefixtures("unchecked_types")
def test_replace_checks_autodiff_and_changes_nothing():
    layer = make(nnx.BatchNorm)
    with pytest.raises(ValueError, match="autodiff must be one of"):
        replace_batch_norm(layer, autodiff="forward")  # pyright: ignore[reportArgumentType]
    assert type(layer) is nnx.BatchNorm


def test_momentum_none_needs_a_count(x):
    layer = replace_batch_norm(make(nnx.BatchNorm, momentum=None))
    with pytest.raises(ValueError, match="momentum=None needs the layer's count"):
        layer(x)


def counted():
    layer = make(momentum=None)
    layer.momentum = 0.9
    return layer


@pytest.mark.parametrize(
    "build", [lambda: make(momentum=None), lambda: make(unbiased=True), counted]
)
def test_restore_rejects_jaxbn_only_options(build):
    layers = [BatchNorm(C, rngs=nnx.Rngs(0)), build()]
    with pytest.raises(ValueError, match=r"can become flax\.nnx\.BatchNorm only"):
        restore_batch_norm(layers)
    assert {type(layer) for layer in layers} == {BatchNorm}
