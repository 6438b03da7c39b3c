"""The layers of linen and nnx: one battery of tests for both.

Tests of one of the two are in `test_linen.py` and `test_nnx.py`.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax_helpers import assert_same, everything
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from layer_apis import APIS

import jaxbn

pytestmark = pytest.mark.usefixtures("standard_promotion")
C = 3


@pytest.fixture(params=APIS)
def create(request):
    """Return a function that creates a layer with random variables."""

    def create(library="jaxbn", **options):
        layer = APIS[request.param](library, **options)
        layer.randomize(np.random.default_rng(1))
        return layer

    return create


@pytest.fixture(params=APIS)
def create_new(request):
    """Return a function that creates a layer with its initial variables."""
    return partial(APIS[request.param], "jaxbn")


@pytest.fixture
def x(rng):
    return jnp.asarray(0.7 + 1.9 * rng.normal(size=(8, C)), jnp.float32)


@pytest.mark.parametrize(
    ("layer", "parent"),
    [(jaxbn.linen.BatchNorm, nn.BatchNorm), (jaxbn.nnx.BatchNorm, nnx.BatchNorm)],
    ids=APIS,
)
def test_layer_is_a_flax_batch_norm(layer, parent):
    assert issubclass(layer, parent)


# The same as Flax.


def test_axis_name_is_not_needed_at_inference(create, x):
    layer = create(axis_name="nowhere", axis_index_groups=[[0], [1]])
    layer(x, train=False)
    with pytest.raises(NameError, match="nowhere"):
        layer(x)


def test_groups_without_axis_name_are_ignored(create, x):
    layers = create(axis_index_groups=[[0], [1]]), create("flax")
    actual, expected = ((layer(x), layer.stats) for layer in layers)
    assert_same(actual, expected, 1e-5)


@pytest.mark.parametrize("batch_size", [5, 1])
def test_integer_input_matches_flax(create, batch_size, rng):
    x = jnp.asarray(rng.integers(-9, 9, size=(batch_size, C)))
    layers = (create(library, momentum=0.8) for library in ("jaxbn", "flax"))
    actual, expected = ((layer(x), layer.stats) for layer in layers)
    assert_same(actual, expected, 1e-5)


def test_groups_under_pmap_match_flax(create, rng):
    x = jnp.asarray(rng.normal(size=(4, 8, C)), jnp.float32)

    def run(library):
        layer = create(library, axis_name="i", axis_index_groups=[[0, 1], [2, 3]])
        step = jax.pmap(layer.apply, "i", in_axes=(None, 0), devices=jax.devices()[:4])
        return step(layer.variables, x)

    assert_same(run("jaxbn"), run("flax"), 1e-5)


# Better than Flax.


def test_large_mean_keeps_variance_accurate(create_new, rng):
    x = (1e4 + rng.normal(size=(4096, C))).astype(np.float32)
    layer = create_new()
    np.testing.assert_allclose(layer(x).std(0), 1, rtol=1e-4)
    expected = 0.99 + 0.01 * x.astype(np.float64).var(0)
    np.testing.assert_allclose(layer.stats["var"], expected, rtol=1e-4)


def test_masked_statistics_are_weighted_by_count_over_devices(create, rng):
    """Two shards with 4 and 1 unmasked elements equal one batch of 5."""
    x = jnp.asarray(rng.normal(size=(8, C)), jnp.float32)
    mask = jnp.array([1, 1, 1, 1, 0, 1, 0, 0], bool)[:, None]
    layer, whole = create(axis_name="i"), create()
    sharded = jax.shard_map(
        lambda variables, x, mask: layer.apply(variables, x, mask=mask),
        mesh=Mesh(jax.devices()[:2], "i"),
        in_specs=(P(), P("i"), P("i")),
        out_specs=(P("i"), P()),
    )
    y, stats = sharded(layer.variables, x, mask)
    assert_same((y, stats), whole.apply(whole.variables, x, mask=mask), 1e-5)
    unmasked = np.asarray(x, np.float64)[np.asarray(mask[:, 0])]
    old = np.asarray(layer.stats["mean"], np.float64)
    expected = 0.99 * old + 0.01 * unmasked.mean(0)
    np.testing.assert_allclose(stats["mean"], expected, rtol=1e-5)


@pytest.mark.parametrize("batch_size", [0, 8], ids=["no elements", "all masked"])
def test_empty_batch_keeps_statistics(create, batch_size, x):
    layer = create()
    x, before = x[:batch_size], layer.stats
    y = layer(x, mask=jnp.zeros((batch_size, 1), bool))
    assert_same(layer.stats, before, 0)
    assert_same(y, layer(x, train=False), 1e-6)


def test_complex_input_is_normalized_by_complex_mean(create_new, rng):
    x = (rng.normal(size=(8, C)) + 1j * rng.normal(size=(8, C))).astype("complex64")
    layer = create_new(momentum=0.0)
    y = layer(x)
    assert (y.dtype, layer.stats["mean"].dtype) == (jnp.complex64, jnp.complex64)
    np.testing.assert_allclose(layer.stats["mean"], np.mean(x, 0), atol=1e-6)
    np.testing.assert_allclose(layer.stats["var"], np.var(x, 0), rtol=1e-5)
    expected = (x - np.mean(x, 0)) / np.sqrt(np.var(x, 0) + 1e-5)
    np.testing.assert_allclose(y, expected, atol=1e-5)


# Not in Flax.


def test_unbiased_updates_running_variance_with_ddof_1(create_new, x):
    layer = create_new(unbiased=True, momentum=0.8)
    layer(x)
    expected = 0.8 + 0.2 * np.asarray(x, np.float64).var(0, ddof=1)
    np.testing.assert_allclose(layer.stats["var"], expected, rtol=1e-5)


def test_unbiased_keeps_statistics_after_one_element(create, x):
    layer = create(unbiased=True)
    before = layer.stats
    layer(x[:1])
    assert_same(layer.stats, before, 0)


def test_momentum_none_averages_all_batches(create_new, rng):
    xs = rng.normal(size=(5, 8, C)).astype(np.float32)
    layer = create_new(momentum=None)
    assert_same(layer.stats["count"], jnp.float32(0), 0)
    for x in xs:
        layer(x)
    exact = xs.astype(np.float64)
    np.testing.assert_allclose(layer.stats["mean"], exact.mean((0, 1)), atol=1e-6)
    np.testing.assert_allclose(layer.stats["var"], exact.var(1).mean(0), rtol=1e-5)
    assert_same(layer.stats["count"], jnp.float32(5), 0)


@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_float_mask_holds_weights_and_integer_mask_bools(create, dtype, rng, x):
    weights = rng.integers(0, 4, size=(8, 1))
    repeats = (weights if dtype == "float32" else weights.astype(bool))[:, 0]
    masked, repeated = create(), create()
    masked(x, mask=jnp.asarray(weights, dtype))
    repeated(np.repeat(np.asarray(x), repeats, axis=0))
    assert_same(masked.stats, repeated.stats, 1e-5)


def tangents(layer, x):
    primals = layer.variables, x
    return jax.jvp(layer.apply, primals, jax.tree.map(jnp.cos, primals))


def test_autodiff_jax_allows_forward_mode(create, x):
    layer, flax = create(autodiff="jax"), create("flax")
    assert_same(tangents(layer, x), tangents(flax, x), 1e-5)


def test_autodiff_custom_vjp_rejects_forward_mode(create, x):
    with pytest.raises(TypeError, match="custom_vjp"):
        tangents(create(), x)


def test_autodiff_rules_have_the_same_gradients(create, x):
    layers = create(), create(autodiff="jax")
    closed, traced = (everything(layer.apply, layer.variables, x) for layer in layers)
    assert_same(closed, traced, 1e-5)


@pytest.mark.usefixtures("unchecked_types")
def test_unknown_autodiff_is_rejected(create, x):
    with pytest.raises(ValueError, match="autodiff must be one of"):
        create(autodiff="forward")(x)


def test_momentum_above_1_is_rejected(create, x):
    with pytest.raises(ValueError, match=r"momentum must lie in \[0, 1\]"):
        create(momentum=1.5)(x)


# Weights, schedules and averages, as in the function.


@pytest.mark.parametrize("scale", [1e-6, 0.1, 1e6])
def test_scale_of_a_floating_mask_does_not_matter(create, scale, x):
    mask = jnp.asarray(np.linspace(0.5, 2, 8)[:, None], jnp.float32)
    layer, scaled = (create(momentum=0.9, unbiased=True) for _ in range(2))
    assert_same(scaled(x, mask=scale * mask), layer(x, mask=mask), 1e-5)
    assert_same(scaled.stats, layer.stats, 1e-5)


def test_softmax_weights_update_by_their_effective_number(create, x):
    layer = create(momentum=0.0, unbiased=True)
    w = np.exp(np.linspace(-1, 1, 8))[:, None]
    w /= w.sum()
    layer(x, mask=jnp.asarray(w, jnp.float32))
    x64 = np.asarray(x, np.float64)
    mean, n = (w * x64).sum(0), 1 / (w**2).sum()
    var = n / (n - 1) * (w * (x64 - mean) ** 2).sum(0)
    np.testing.assert_allclose(layer.stats["mean"], mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(layer.stats["var"], var, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("library", ["jaxbn", "flax"])
def test_momentum_and_epsilon_may_be_schedules(library, x):
    """A step of the schedule is traced; all steps share one program."""
    traces = 0

    @jax.jit
    def step(variables, momentum, epsilon):
        nonlocal traces
        traces += 1
        norm = jaxbn.linen.BatchNorm if library == "jaxbn" else nn.BatchNorm
        layer = norm(False, momentum=momentum, epsilon=epsilon)
        return layer.apply(variables, x, mutable=["batch_stats"])

    variables = nn.BatchNorm(False).init(jax.random.key(0), x)
    x64 = np.asarray(x, np.float64)
    with jaxbn.linen.replace_batch_norm():
        for momentum, epsilon in ((0.9, 1e-5), (0.5, 0.1)):
            y, updates = step(variables, momentum, epsilon)
            expected = (x64 - x64.mean(0)) / np.sqrt(x64.var(0) + epsilon)
            np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
            mean = (1 - momentum) * x64.mean(0)
            np.testing.assert_allclose(
                updates["batch_stats"]["mean"], mean, rtol=1e-4, atol=1e-5
            )
    assert traces == 1


def test_nnx_momentum_may_be_a_schedule(x):
    layer = jaxbn.nnx.BatchNorm(C, rngs=nnx.Rngs(0))

    @nnx.jit
    def step(layer, momentum):
        layer.momentum, old = momentum, layer.momentum
        layer(x)
        layer.momentum = old

    for momentum in (0.9, 0.5):
        step(layer, momentum)
    mean = np.asarray(x, np.float64).mean(0)
    np.testing.assert_allclose(layer.mean[...], 0.55 * mean, rtol=1e-5)


def test_average_of_variables_keeps_dtypes(create_new, x):
    layer = create_new(momentum=None)
    layer(x)
    first = layer.stats
    layer(2 * x)
    average: Any = optax.incremental_update(layer.stats, first, 0.5)
    assert jax.tree.map(lambda a: a.dtype, average) == jax.tree.map(
        lambda a: a.dtype, first
    )
    assert_same(average["count"], jnp.float32(1.5), 0)


def test_momentum_0_replaces_nan(create, x):
    layer = create(momentum=0.0)
    layer.variables = jax.tree.map(lambda a: a * jnp.nan, layer.variables)
    layer(x)
    mean = np.asarray(x, np.float64).mean(0)
    np.testing.assert_allclose(layer.stats["mean"], mean, rtol=1e-5)
