"""Fine-tuning with frozen statistics, or with all of batch norm frozen."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax_helpers import assert_same, randomize

import jaxbn

pytestmark = pytest.mark.usefixtures("standard_promotion")
C = 3
EPSILON = 1e-5


@pytest.fixture
def x(rng):
    return jnp.asarray(0.7 + 1.9 * rng.normal(size=(8, C)), jnp.float32)


@pytest.fixture
def dy(rng):
    return jnp.asarray(rng.normal(size=(8, C)), jnp.float32)


def affine_gradient(scale, mean, var, x, dy) -> dict[str, Any]:
    """Differentiate y = x̂ · scale + bias, x̂ = (x - mean) / √(var + ε), by hand."""
    scale, mean, var, x, dy = (
        np.asarray(a, np.float64) for a in (scale, mean, var, x, dy)
    )
    inv_std = 1 / np.sqrt(var + EPSILON)
    return {
        "scale": (dy * (x - mean) * inv_std).sum(0),
        "bias": dy.sum(0),
        "x": dy * scale * inv_std,
    }


def assert_gradient(actual, expected):
    for name, want in expected.items():
        tolerance = 1e-6 * np.abs(want).max()
        np.testing.assert_allclose(actual[name], want, atol=tolerance, err_msg=name)


# The statistics.


def test_function_keeps_state_and_has_affine_gradient(rng, x, dy):
    params, state = jaxbn.init(C)
    params, state = randomize(rng, (params, state._replace(count=jnp.float32(0))))
    state = state._replace(count=jnp.int32(4))

    def loss(params, x):
        y, new_state = jaxbn.batch_norm(params, state, x, train=False)
        return (y * dy).sum(), new_state

    (dparams, dx), new_state = jax.grad(loss, (0, 1), has_aux=True)(params, x)
    gradient = {"scale": dparams.scale, "bias": dparams.bias, "x": dx}
    expected = affine_gradient(params.scale, state.mean, state.var, x, dy)
    assert_gradient(gradient, expected)
    assert_same(new_state, state, 0)


@pytest.mark.parametrize("norm", [jaxbn.linen.BatchNorm, nn.BatchNorm])
def test_linen_frozen_statistics_give_affine_gradient(norm, rng, x, dy):
    layer = norm(use_running_average=True)
    variables = randomize(rng, jax.eval_shape(layer.init, jax.random.key(0), x))
    params, stats = variables["params"], variables["batch_stats"]

    def loss(params, x):
        return (layer.apply({"params": params, "batch_stats": stats}, x) * dy).sum()

    dparams, dx = jax.grad(loss, (0, 1))(params, x)
    expected = affine_gradient(params["scale"], stats["mean"], stats["var"], x, dy)
    assert_gradient(dparams | {"x": dx}, expected)


def nnx_model(rng) -> Any:
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Linear(C, C, rngs=rngs),
        jaxbn.nnx.BatchNorm(C, rngs=rngs),
        nnx.Dropout(0.5, rngs=rngs),
        nnx.BatchNorm(C, rngs=rngs),
    )
    variables = nnx.state(model, (nnx.Param, nnx.BatchStat))
    nnx.update(model, randomize(rng, variables))
    return model


@pytest.mark.parametrize("way", ["set_attributes", "view"])
def test_nnx_frozen_statistics_give_affine_gradient(way, rng, x, dy):
    model = frozen = nnx_model(rng)
    model.train()
    if way == "view":
        frozen = nnx.view(model, use_running_average=True)
        assert not model.layers[1].use_running_average
    else:
        model.set_attributes(nnx.BatchNorm, use_running_average=True)
    assert not frozen.layers[2].deterministic  # the rest trains
    stats = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    frozen(x)
    norm = frozen.layers[1]

    def loss(norm, x):
        return (norm(x) * dy).sum()

    dnorm, dx = nnx.grad(loss, argnums=(0, 1))(norm, x)
    scale, mean, var = norm.scale[...], norm.mean[...], norm.var[...]
    gradient = nnx.to_pure_dict(dnorm) | {"x": dx}
    assert_gradient(gradient, affine_gradient(scale, mean, var, x, dy))
    assert_same(nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)), stats, 0)


# Scale and bias.


class Block(nn.Module):
    """Flax's and jaxbn's norm among layers with parameters of the same names."""

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.BatchNorm(not train, use_scale=False)(nn.Dense(C)(x))
        boxed = nn.with_partitioning(nn.initializers.ones, (None,))
        x = jaxbn.linen.BatchNorm(not train, scale_init=boxed, momentum=None)(x)
        return nn.LayerNorm()(x)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        return nn.Dense(C)(Block()(x, train))


NET_MASK = {
    "Block_0": {
        "Dense_0": {"kernel": False, "bias": False},
        "BatchNorm_0": {"bias": True},
        "BatchNorm_1": {"scale": True, "bias": True},
        "LayerNorm_0": {"scale": False, "bias": False},
    },
    "Dense_0": {"kernel": False, "bias": False},
}


def moved(before, after):
    """Return whether each parameter changed in any bit."""
    return jax.tree.map(lambda a, b: bool((a != b).any()), before, after)


def complement(mask):
    return jax.tree.map(lambda m: not m, mask)


OPTIMIZERS = {
    "freeze": lambda mask: optax.chain(
        optax.adamw(1e-2, weight_decay=0.1), optax.transforms.freeze(mask)
    ),
    "multi_transform": lambda mask: optax.multi_transform(
        {True: optax.set_to_zero(), False: optax.adam(1e-2)}, mask
    ),
}


@pytest.fixture
def net(rng, x):
    return Net(), randomize(rng, jax.eval_shape(Net().init, jax.random.key(0), x))


def test_linen_mask_marks_batch_norms_alone(net):
    _, variables = net
    mask = jaxbn.linen.batch_norm_mask(variables)
    assert jax.tree.structure(mask) == jax.tree.structure(variables["params"])
    assert nn.unbox(mask) == NET_MASK
    frozen_dict = jaxbn.linen.batch_norm_mask(nn.FrozenDict(variables))
    assert nn.unbox(frozen_dict) == nn.FrozenDict(NET_MASK)


@pytest.mark.parametrize("way", OPTIMIZERS)
def test_linen_mask_freezes_parameters(way, net, x, dy):
    model, variables = net
    params, stats = variables["params"], variables["batch_stats"]
    mask = jaxbn.linen.batch_norm_mask(variables)
    optimizer = OPTIMIZERS[way](mask)

    def loss(params):
        y = model.apply({"params": params, "batch_stats": stats}, x, train=False)
        return (y * dy).sum()

    @jax.jit
    def step(params, opt_state):
        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    trained, opt_state = params, optimizer.init(params)
    for _ in range(2):
        trained, opt_state = step(trained, opt_state)
    assert moved(params, trained) == complement(mask)


def test_inverted_mask_keeps_weight_decay_off(net):
    params = net[1]["params"]
    others = complement(jaxbn.linen.batch_norm_mask(net[1]))
    decay = optax.add_decayed_weights(0.5, mask=others)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = decay.update(zeros, decay.init(params), params)
    expected = jax.tree.map(lambda p, m: 0.5 * p if m else 0 * p, params, others)
    assert_same(updates, expected, 0)


def test_mask_of_a_single_batch_norm(x):
    layer = nn.BatchNorm(True)
    mask = jaxbn.linen.batch_norm_mask(jax.eval_shape(layer.init, jax.random.key(0), x))
    assert mask == {"scale": True, "bias": True}


@pytest.mark.parametrize("way", OPTIMIZERS)
def test_nnx_mask_freezes_parameters(way, rng, x, dy):
    model = nnx_model(rng)
    model.train()
    model.set_attributes(nnx.BatchNorm, use_running_average=True)
    mask = jaxbn.nnx.batch_norm_mask(model)
    expected = {
        0: {"kernel": False, "bias": False},
        1: {"scale": True, "bias": True},
        3: {"scale": True, "bias": True},
    }
    assert nnx.to_pure_dict(mask) == {"layers": expected}
    optimizer = nnx.Optimizer(model, OPTIMIZERS[way](mask), wrt=nnx.Param)
    before = nnx.to_pure_dict(nnx.state(model, nnx.Param))

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda model: (model(x) * dy).sum())(model)
        optimizer.update(model, grads)

    for _ in range(2):
        step(model, optimizer)
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert moved(before, after) == complement(nnx.to_pure_dict(mask))


def test_mask_rejects_model_without_batch_norm(net):
    with pytest.raises(ValueError, match="must have a batch norm; found none"):
        jaxbn.linen.batch_norm_mask({"params": net[1]["params"]})
    with pytest.raises(ValueError, match="must have a batch norm; found none"):
        jaxbn.nnx.batch_norm_mask(nnx.LayerNorm(C, rngs=nnx.Rngs(0)))
