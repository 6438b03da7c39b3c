"""`jaxbn.linen`: the layer beside Flax's, and its replacement in unchanged models.

Tests that linen and nnx share are in `tests/layers/test_layers.py`.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax_helpers import assert_same, everything, randomize
from jax.sharding import PartitionSpec as P

from jaxbn.linen import BatchNorm, replace_batch_norm

pytestmark = pytest.mark.usefixtures("standard_promotion")
C = 3
NORMS = (BatchNorm, nn.BatchNorm)


@pytest.fixture
def x(rng):
    return jnp.asarray(0.7 + 1.9 * rng.normal(size=(8, C)), jnp.float32)


def train(layer, variables, x, **options) -> tuple[Any, Any]:
    """One training step of a layer: y and the new statistics."""
    y, updates = layer.apply(variables, x, False, mutable=["batch_stats"], **options)
    return y, updates["batch_stats"]


def start(layer, x) -> Any:
    return layer.init(jax.random.key(0), x, True)


# The same as Flax.


def test_fields_and_defaults_are_flax_s():
    assert issubclass(BatchNorm, nn.BatchNorm)
    expected = {f.name: f.default for f in dataclasses.fields(nn.BatchNorm)}
    actual = {f.name: f.default for f in dataclasses.fields(BatchNorm)}
    jaxbn_only = {"unbiased": False, "autodiff": "custom_vjp"}
    assert actual == expected | jaxbn_only | {"virtual_batch_size": None}
    positional = [f.name for f in dataclasses.fields(BatchNorm) if not f.kw_only]
    assert positional == [
        f.name for f in dataclasses.fields(nn.BatchNorm) if not f.kw_only
    ]


def test_init_matches_flax_and_updates_nothing(x):
    options: dict[str, Any] = {
        "scale_init": nn.with_partitioning(nn.initializers.normal(), ("model",)),
        "bias_init": nn.initializers.normal(),
        "param_dtype": jnp.bfloat16,
    }
    layers = BatchNorm(**options), nn.BatchNorm(**options)
    actual, expected = (n.init(jax.random.key(1), x, False) for n in layers)
    assert_same(actual, expected, 0)
    specs: Any = nn.get_partition_spec(actual)
    assert specs["params"]["scale"] == P("model")
    np.testing.assert_array_equal(actual["batch_stats"]["mean"], 0)
    np.testing.assert_array_equal(actual["batch_stats"]["var"], 1)


def test_axis_name_is_not_needed_in_init(x):
    layer = BatchNorm(axis_name="nowhere", axis_index_groups=[[0], [1]])
    variables = layer.init(jax.random.key(0), x, False)
    layer.apply(variables, x, True)
    with pytest.raises(NameError, match="nowhere"):
        train(layer, variables, x)


@pytest.mark.parametrize("layer", NORMS)
@pytest.mark.parametrize(("given", "called"), [(True, True), (None, None)])
def test_mode_must_be_given_once(layer, given, called, x):
    with pytest.raises(ValueError, match="use_running_average"):
        layer(given).init(jax.random.key(0), x, called)


@pytest.mark.parametrize("dtype", ["int32", "int8", "bool"])
def test_output_dtype_matches_flax(dtype):
    x = jnp.asarray([[1, 0, 1], [0, 0, 1]], dtype)
    variables = start(BatchNorm(), x)
    for wide in (True, False):
        actual, expected = (
            n(True, param_dtype=jnp.bfloat16, force_float32_reductions=wide).apply(
                variables, x
            )
            for n in NORMS
        )
        assert_same(actual, expected, 3e-2)


def test_mask_is_ignored_at_inference(x):
    layer = BatchNorm(True)
    variables = layer.init(jax.random.key(0), x)
    masked: Any = layer.apply(variables, x, mask=jnp.zeros((2, 2), bool))
    assert_same(masked, layer.apply(variables, x), 0)


def test_summary_and_lazy_init_match_flax(x):
    layers = BatchNorm(True), nn.BatchNorm(True)
    actual, expected = (n.tabulate(jax.random.key(0), x) for n in layers)
    assert actual == expected
    abstract = jax.ShapeDtypeStruct(x.shape, x.dtype)
    actual, expected = (n.lazy_init(jax.random.key(0), abstract) for n in layers)
    assert_same(actual, expected, 0)


LIFTS = {
    "jit": lambda block: nn.jit(block),
    "remat": lambda block: nn.remat(block),
    "vmap": lambda block: nn.vmap(
        block, variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True},
    ),
    "vmap sync": lambda block: nn.vmap(
        block, variable_axes={"params": None, "batch_stats": None},
        split_rngs={"params": False}, axis_name="batch",
    ),
    "scan layers": lambda block: nn.scan(
        block, variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True}, length=4,
    ),
    "scan carry": lambda block: nn.scan(
        block, variable_broadcast="params", variable_carry="batch_stats",
        split_rngs={"params": False}, length=4,
    ),
}  # fmt: skip


class Block(nn.Module):
    """A layer with the signature that every lifted transformation accepts."""

    norm: Any

    @nn.compact
    def __call__(self, x, *_):
        y = nn.tanh(nn.Dense(C)(self.norm(use_running_average=False)(x)))
        return y, y.mean()


@pytest.mark.parametrize("lift", LIFTS)
def test_lifted_transformations_match_flax(lift, rng):
    x = jnp.asarray(rng.normal(size=(4, 8, C)), jnp.float32)
    x = x if "vmap" in lift else x[0]
    name = "batch" if lift == "vmap sync" else None
    norms = [partial(norm, axis_name=name) for norm in NORMS]
    # A scan can't create the variables that it carries.
    made = Block if lift == "scan carry" else LIFTS[lift](Block)
    initial, flax = (jax.jit(made(norm).init)(jax.random.key(0), x) for norm in norms)
    assert_same(initial, flax, 0)
    variables = jax.tree.map(lambda a, b: a + b / 3, initial, randomize(rng, initial))
    models = [LIFTS[lift](Block)(norm) for norm in norms]
    steps = (partial(model.apply, mutable=["batch_stats"]) for model in models)
    actual, expected = (jax.jit(partial(everything, s))(variables, x) for s in steps)
    assert_same(actual, expected, 2e-5)


def test_groups_in_an_array_match_flax(rng):
    x = jnp.asarray(rng.normal(size=(4, 8, C)), jnp.float32)
    groups = np.array([[0, 1], [2, 3]])
    actual, expected = (
        jax.pmap(
            partial(train, layer, start(layer, x[0])), "i", devices=jax.devices()[:4]
        )(x)
        for layer in (n(axis_name="i", axis_index_groups=groups) for n in NORMS)
    )
    assert_same(actual, expected, 1e-5)


@pytest.mark.parametrize("dtype", ["complex64", None])
def test_complex_input_matches_flax(dtype, rng):
    """Flax needs its stable variance. The mean turns complex, the variance not."""
    x = jnp.asarray(rng.normal(size=(8, C)) + 1j * rng.normal(size=(8, C)), "complex64")
    actual, expected = (
        everything(partial(train, layer), start(layer, x), x)
        for layer in (n(dtype=dtype, use_fast_variance=False) for n in NORMS)
    )
    (y, stats), _ = actual
    assert (y.dtype, stats["mean"].dtype) == (jnp.complex64, jnp.complex64)
    assert_same(actual, expected, 1e-5)


# Dtypes of the statistics.


@pytest.mark.usefixtures("x64")
def test_statistics_keep_their_dtype_under_x64(rng):
    x = rng.normal(size=(8, C))
    y, stats = train(BatchNorm(), start(BatchNorm(), x), x)
    assert (y.dtype, stats["mean"].dtype, stats["var"].dtype) == (
        (jnp.float64, jnp.float32, jnp.float32)
    )
    expected = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
    np.testing.assert_allclose(y, expected, rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_wider_dtype_is_used_for_computation(rng):
    x = jnp.asarray(rng.normal(size=(8, C)), jnp.float32)
    layer = BatchNorm(dtype=jnp.float64)
    y, _ = train(layer, start(layer, x), x)
    x = np.asarray(x, np.float64)
    expected = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
    np.testing.assert_allclose(y, expected, rtol=1e-12)


def test_half_precision_statistics_are_summed_in_float32(rng):
    """`force_float32_reductions=False` stores them in `param_dtype`, as Flax does."""
    x = jnp.asarray(1 + rng.normal(size=(4096, C)), jnp.bfloat16)
    options: dict[str, Any] = {
        "param_dtype": jnp.bfloat16,
        "force_float32_reductions": False,
        "momentum": 0.0,
    }
    variables = start(BatchNorm(**options), x)
    assert_same(variables, start(nn.BatchNorm(**options), x), 0)
    y, stats = train(BatchNorm(**options), variables, x)
    assert y.dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64)
    assert_same(
        stats,
        {"mean": jnp.bfloat16(exact.mean(0)), "var": jnp.bfloat16(exact.var(0))},
        0,
    )


# Not in Flax.


def test_momentum_none_counts_from_variables_without_a_count(rng):
    """The first batch replaces the statistics of Flax's variables."""
    xs = rng.normal(size=(2, 8, C)).astype(np.float32)
    layer = BatchNorm(momentum=None)
    variables = start(nn.BatchNorm(), xs[0])
    for x in xs:
        variables |= {"batch_stats": train(layer, variables, x)[1]}
    stats, exact = variables["batch_stats"], xs.astype(np.float64)
    np.testing.assert_allclose(stats["mean"], exact.mean((0, 1)), atol=1e-6)
    assert stats["count"] == 2
    layer.apply(variables, xs[0], True)


def test_axis_beyond_x_is_rejected(x):
    with pytest.raises(ValueError, match="axis must name feature axes of x, from -2"):
        BatchNorm(True, axis=2).init(jax.random.key(0), x)


# Unchanged models.


class Scaled(nn.BatchNorm):
    """A subclass of Flax's layer."""

    factor: float = 2.0

    @nn.compact
    def __call__(self, x, use_running_average=None, *, mask=None):
        return self.factor * super().__call__(x, use_running_average, mask=mask)


class Model(nn.Module):
    """Flax's layer in setup, in a submodule, and as the parent of a subclass."""

    norm: Any = nn.BatchNorm
    scaled: Any = Scaled

    def setup(self):
        self.first = self.norm(momentum=0.8)
        self.rest = nn.Sequential([nn.Dense(C), self.scaled(momentum=0.8)])

    def __call__(self, x, use_running_average):
        x = self.first(x, use_running_average, mask=x[:, :1] > 0)
        return self.rest.layers[1](self.rest.layers[0](x), use_running_average)


class JaxbnScaled(BatchNorm):
    """A subclass of jaxbn's layer."""

    factor: float = 2.0

    @nn.compact
    def __call__(self, x, use_running_average=None, **options):
        return self.factor * super().__call__(x, use_running_average, **options)


def test_replace_batch_norm_computes_as_jaxbn(x):
    variables = Model().init(jax.random.key(0), x, True)
    far = x + 1e4

    def trained(model):
        return jax.jit(partial(everything, partial(train, model)))(variables, far)

    expected, flax = trained(Model(BatchNorm, JaxbnScaled)), trained(Model())
    with replace_batch_norm():
        assert_same(Model().init(jax.random.key(0), x, True), variables, 0)
        replaced = trained(Model())
    assert_same(replaced, expected, 0)
    with pytest.raises(AssertionError):  # there is a difference to see
        assert_same(replaced, flax, 1e-2)
    assert_same(trained(Model()), flax, 0)


def test_replace_batch_norm_ends_after_an_error(x):
    variables = start(nn.BatchNorm(), x)
    flax = train(nn.BatchNorm(), variables, x + 1e4)
    with pytest.raises(KeyError), replace_batch_norm():
        raise KeyError
    assert_same(train(nn.BatchNorm(), variables, x + 1e4), flax, 0)


@nn.jit
class Compiled(nn.Module):
    """A class that is compiled once for all its instances."""

    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=False)(x)


@pytest.mark.parametrize("first", ["inside", "outside"])
@pytest.mark.parametrize("model", [nn.BatchNorm(False), Compiled()])
def test_replace_batch_norm_retraces_compiled_functions(model, first, x):
    x = x + 1e4
    variables = model.init(jax.random.key(0), x)
    step = partial(model.apply, mutable=["batch_stats"])
    compiled = jax.jit(step)

    def stds():
        return [float(f(variables, x)[0].std(0)[0]) for f in (step, compiled)]

    if first == "inside":
        with replace_batch_norm():
            stds()
    assert all(abs(std - 1) > 0.1 for std in stds())  # Flax's variance cancels
    with replace_batch_norm():
        np.testing.assert_allclose(stds(), 1, rtol=1e-4)
    assert all(abs(std - 1) > 0.1 for std in stds())


def test_replace_batch_norm_is_a_decorator(x):
    x, layer = x + 1e4, nn.BatchNorm()
    variables = start(layer, x)
    decorated = jax.jit(replace_batch_norm()(partial(train, layer)))
    for _ in range(2):
        assert_same(decorated(variables, x), train(BatchNorm(), variables, x), 1e-5)


def test_replace_batch_norm_keeps_options_of_jaxbn_layers(x):
    """Options that Flax does not have survive inside."""
    layer = BatchNorm(unbiased=True)
    variables = start(layer, x)
    with replace_batch_norm():
        inside = train(layer, variables, x)
    assert_same(inside, train(layer, variables, x), 0)


def test_replace_batch_norm_passes_autodiff_on(x):
    variables, layer = start(nn.BatchNorm(), x), nn.BatchNorm()

    def tangents():
        return jax.jvp(lambda x: train(layer, variables, x), (x,), (jnp.cos(x),))

    expected = tangents()
    with replace_batch_norm(autodiff="jax"):
        assert_same(tangents(), expected, 1e-5)
    with replace_batch_norm(), pytest.raises(TypeError, match="custom_vjp"):
        tangents()


@pytest.mark.usefixtures("unchecked_types")
def test_replace_batch_norm_checks_autodiff_at_once():
    with pytest.raises(ValueError, match="autodiff must be one of"):
        replace_batch_norm(autodiff="forward")  # pyright: ignore[reportArgumentType]


@pytest.mark.usefixtures("unchecked_types")
def test_replace_batch_norm_takes_no_positional_argument():
    with pytest.raises(TypeError, match="0 positional"):
        replace_batch_norm(nn.BatchNorm())  # pyright: ignore[reportCallIssue]
