"""`jaxbn.linen.BatchNorm`: where Flax's stands, what it adds, and models untouched."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax_helpers import assert_same, everything, randomize
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jaxbn
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


# Where Flax's layer stands.


def test_it_is_a_flax_batch_norm_with_its_fields_and_defaults():
    assert issubclass(BatchNorm, nn.BatchNorm)
    theirs = {f.name: f.default for f in dataclasses.fields(nn.BatchNorm)}
    ours = {f.name: f.default for f in dataclasses.fields(BatchNorm)}
    assert ours == theirs | {"unbiased": False, "autodiff": "custom_vjp"}
    positional = [f.name for f in dataclasses.fields(BatchNorm) if not f.kw_only]
    assert positional == [
        f.name for f in dataclasses.fields(nn.BatchNorm) if not f.kw_only
    ]


def test_init_makes_the_same_variables_and_updates_nothing(x):
    options: dict[str, Any] = {
        "scale_init": nn.with_partitioning(nn.initializers.normal(), ("model",)),
        "bias_init": nn.initializers.normal(),
        "param_dtype": jnp.bfloat16,
    }
    layers = BatchNorm(**options), nn.BatchNorm(**options)
    ours, theirs = (n.init(jax.random.key(1), x, False) for n in layers)
    assert_same(ours, theirs, 0)
    specs: Any = nn.get_partition_spec(ours)
    assert specs["params"]["scale"] == P("model")
    np.testing.assert_array_equal(ours["batch_stats"]["mean"], 0)
    np.testing.assert_array_equal(ours["batch_stats"]["var"], 1)


def test_the_axis_need_not_exist_in_init_nor_at_inference(x):
    layer = BatchNorm(axis_name="nowhere", axis_index_groups=[[0], [1]])
    variables = layer.init(jax.random.key(0), x, False)
    layer.apply(variables, x, True)
    with pytest.raises(NameError, match="nowhere"):
        train(layer, variables, x)


def test_groups_without_an_axis_say_nothing_as_in_flax(x):
    layer = BatchNorm(axis_index_groups=[[0], [1]])
    variables = start(layer, x)
    assert_same(train(layer, variables, x), train(nn.BatchNorm(), variables, x), 1e-5)


@pytest.mark.parametrize("layer", NORMS)
@pytest.mark.parametrize(("given", "called"), [(True, True), (None, None)])
def test_the_mode_is_given_once(layer, given, called, x):
    with pytest.raises(ValueError, match="use_running_average"):
        layer(given).init(jax.random.key(0), x, called)


def test_integers_and_a_single_row_are_taken_as_flax_takes_them(rng):
    layers = BatchNorm(momentum=0.8), nn.BatchNorm(momentum=0.8)
    for rows in (5, 1):
        x = jnp.asarray(rng.integers(-9, 9, size=(rows, C)))
        variables = randomize(rng, start(layers[0], x))
        ours, theirs = (train(layer, variables, x) for layer in layers)
        assert_same(ours, theirs, 1e-5)


@pytest.mark.parametrize("dtype", ["int32", "int8", "bool"])
def test_the_dtype_of_y_is_that_of_flax(dtype):
    x = jnp.asarray([[1, 0, 1], [0, 0, 1]], dtype)
    variables = start(BatchNorm(), x)
    for wide in (True, False):
        ours, theirs = (
            n(True, param_dtype=jnp.bfloat16, force_float32_reductions=wide).apply(
                variables, x
            )
            for n in NORMS
        )
        assert_same(ours, theirs, 3e-2)


def test_a_mask_says_nothing_at_inference(x):
    layer = BatchNorm(True)
    variables = layer.init(jax.random.key(0), x)
    masked: Any = layer.apply(variables, x, mask=jnp.zeros((2, 2), bool))
    assert_same(masked, layer.apply(variables, x), 0)


def test_summaries_and_lazy_init_are_those_of_flax(x):
    layers = BatchNorm(True), nn.BatchNorm(True)
    ours, theirs = (n.tabulate(jax.random.key(0), x) for n in layers)
    assert ours == theirs
    abstract = jax.ShapeDtypeStruct(x.shape, x.dtype)
    ours, theirs = (n.lazy_init(jax.random.key(0), abstract) for n in layers)
    assert_same(ours, theirs, 0)


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
    """A layer as any lifted transformation wants it, scan included."""

    norm: Any

    @nn.compact
    def __call__(self, x, *_):
        y = nn.tanh(nn.Dense(C)(self.norm(use_running_average=False)(x)))
        return y, y.mean()


@pytest.mark.parametrize("lift", LIFTS)
def test_lifted_transformations(lift, rng):
    x = jnp.asarray(rng.normal(size=(4, 8, C)), jnp.float32)
    x = x if "vmap" in lift else x[0]
    name = "batch" if lift == "vmap sync" else None
    norms = [partial(norm, axis_name=name) for norm in NORMS]
    # A scan can't make what it carries.
    made = Block if lift == "scan carry" else LIFTS[lift](Block)
    initial, theirs = (made(norm).init(jax.random.key(0), x) for norm in norms)
    assert_same(initial, theirs, 0)
    variables = jax.tree.map(lambda a, b: a + b / 3, initial, randomize(rng, initial))
    models = [LIFTS[lift](Block)(norm) for norm in norms]
    ours, theirs = (
        everything(partial(model.apply, mutable=["batch_stats"]), variables, x)
        for model in models
    )
    assert_same(ours, theirs, 2e-5)


def test_groups_under_pmap_are_those_of_flax(rng):
    x = jnp.asarray(rng.normal(size=(4, 8, C)), jnp.float32)
    groups = np.array([[0, 1], [2, 3]])
    ours, theirs = (
        jax.pmap(
            partial(train, layer, start(layer, x[0])), "i", devices=jax.devices()[:4]
        )(x)
        for layer in (n(axis_name="i", axis_index_groups=groups) for n in NORMS)
    )
    assert_same(ours, theirs, 1e-5)


@pytest.mark.parametrize("dtype", ["complex64", None])
def test_complex_input(dtype, rng):
    """As Flax with its stable variance: the mean turns complex, the variance not."""
    x = jnp.asarray(rng.normal(size=(8, C)) + 1j * rng.normal(size=(8, C)), "complex64")
    ours, theirs = (
        everything(partial(train, layer), start(layer, x), x)
        for layer in (n(dtype=dtype, use_fast_variance=False) for n in NORMS)
    )
    (y, stats), _ = ours
    assert (y.dtype, stats["mean"].dtype) == (jnp.complex64, jnp.complex64)
    assert_same(ours, theirs, 1e-5)


# Where Flax is wrong.


def test_a_large_mean(rng):
    x = 1e4 + rng.normal(size=(4096, C))
    y, stats = train(BatchNorm(), start(BatchNorm(), x), x.astype(np.float32))
    x = x.astype(np.float32).astype(np.float64)
    np.testing.assert_allclose(y.std(0), 1, rtol=1e-4)
    np.testing.assert_allclose(stats["var"], 0.99 + 0.01 * x.var(0), rtol=1e-4)


def test_masked_statistics_are_weighted_by_count_over_devices(rng):
    """Two shards with 4 and 1 valid rows, as one batch of 5."""
    x = jnp.asarray(rng.normal(size=(2, 4, C)), jnp.float32)
    mask = jnp.array([[1, 1, 1, 1], [0, 1, 0, 0]], bool)[..., None]
    layer = BatchNorm(axis_name="i")
    variables = randomize(rng, start(layer, x[0]))
    step = jax.shard_map(
        lambda x, mask: train(layer, variables, x, mask=mask),
        mesh=Mesh(jax.devices()[:2], "i"),
        in_specs=P("i"),
        out_specs=(P("i"), P()),
    )
    y, stats = step(x.reshape(8, C), mask.reshape(8, 1))
    whole = train(BatchNorm(), variables, x.reshape(8, C), mask=mask.reshape(8, 1))
    assert_same((y, stats), whole, 1e-5)
    valid = np.asarray(x, np.float64)[np.asarray(mask[..., 0])]
    old = np.asarray(variables["batch_stats"]["mean"], np.float64)
    np.testing.assert_allclose(stats["mean"], 0.99 * old + 0.01 * valid.mean(0), 1e-5)


@pytest.mark.parametrize("rows", [0, 4], ids=["no rows", "all masked"])
def test_an_empty_batch_leaves_the_statistics_alone(rows, rng):
    x = jnp.asarray(rng.normal(size=(rows, C)), jnp.float32)
    layer = BatchNorm()
    variables = randomize(rng, start(layer, x))
    y, stats = train(layer, variables, x, mask=jnp.zeros((rows, 1), bool))
    assert_same(stats, variables["batch_stats"], 0)
    assert_same(y, layer.apply(variables, x, True), 1e-6)


@pytest.mark.usefixtures("x64")
def test_the_statistics_keep_their_dtype_under_x64(rng):
    x = rng.normal(size=(8, C))
    y, stats = train(BatchNorm(), start(BatchNorm(), x), x)
    assert (y.dtype, stats["mean"].dtype, stats["var"].dtype) == (
        (jnp.float64, jnp.float32, jnp.float32)
    )
    expected = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
    np.testing.assert_allclose(y, expected, rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_a_wider_dtype_is_computed_in_it(rng):
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


# What it adds.


def test_unbiased(x):
    layer = BatchNorm(unbiased=True, momentum=0.8)
    _, stats = train(layer, start(layer, x), x)
    expected = 0.8 + 0.2 * np.asarray(x, np.float64).var(0, ddof=1)
    np.testing.assert_allclose(stats["var"], expected, rtol=1e-5)


def test_unbiased_leaves_the_statistics_alone_after_one_row(x):
    layer = BatchNorm(unbiased=True)
    variables = start(layer, x)
    assert_same(train(layer, variables, x[:1])[1], variables["batch_stats"], 0)


def test_momentum_none_weighs_all_batches_alike(rng):
    """Also from Flax's variables, which hold no count: those count as no batch."""
    xs = rng.normal(size=(5, 8, C)).astype(np.float32)
    layer = BatchNorm(momentum=None)
    variables = start(layer, xs[0])
    assert_same(variables["batch_stats"]["count"], jnp.int32(0), 0)
    stats = start(nn.BatchNorm(), xs[0])["batch_stats"]
    for x in xs:
        _, stats = train(layer, variables | {"batch_stats": stats}, x)
    exact = xs.astype(np.float64)
    np.testing.assert_allclose(stats["mean"], exact.mean((0, 1)), atol=1e-6)
    np.testing.assert_allclose(stats["var"], exact.var(1).mean(0), rtol=1e-5)
    assert stats["count"] == 5
    layer.apply(variables | {"batch_stats": stats}, xs[0], True)


def test_floats_weigh_and_integers_do_not(rng, x):
    weights = rng.integers(0, 4, size=(8, 1))
    variables = start(BatchNorm(), x)
    repeated = jnp.repeat(x, weights[:, 0], axis=0)
    for mask, rows in (
        (weights.astype(np.float32), repeated),
        (weights, x[weights[:, 0] > 0]),
    ):
        _, stats = train(BatchNorm(), variables, x, mask=jnp.asarray(mask))
        assert_same(stats, train(BatchNorm(), variables, rows)[1], 1e-5)


def test_errors_are_those_of_the_function(x):
    with pytest.raises(ValueError, match="axis must name feature axes of x, from -2"):
        BatchNorm(True, axis=2).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"momentum must lie in \[0, 1\]"):
        start(BatchNorm(momentum=1.5), x)


# Models untouched.


class Scaled(nn.BatchNorm):
    """Somebody's own layer, on top of Flax's."""

    factor: float = 2.0

    @nn.compact
    def __call__(self, x, use_running_average=None, *, mask=None):
        return self.factor * super().__call__(x, use_running_average, mask=mask)


class Model(nn.Module):
    """Flax's layer in a submodule, in setup, and below a subclass."""

    norm: Any = nn.BatchNorm
    scaled: Any = Scaled

    def setup(self):
        self.first = self.norm(momentum=0.8)
        self.rest = nn.Sequential([nn.Dense(C), self.scaled(momentum=0.8)])

    def __call__(self, x, use_running_average):
        x = self.first(x, use_running_average, mask=x[:, :1] > 0)
        return self.rest.layers[1](self.rest.layers[0](x), use_running_average)


class OurScaled(BatchNorm):
    """`Scaled`, on top of ours."""

    factor: float = 2.0

    @nn.compact
    def __call__(self, x, use_running_average=None, *, mask=None):
        return self.factor * super().__call__(x, use_running_average, mask=mask)


def test_replaced_layers_compute_as_ours(x):
    variables = Model().init(jax.random.key(0), x, True)
    far = x + 1e4
    ours = everything(partial(train, Model(BatchNorm, OurScaled)), variables, far)
    flax = everything(partial(train, Model()), variables, far)
    with replace_batch_norm():
        assert_same(Model().init(jax.random.key(0), x, True), variables, 0)
        replaced = everything(partial(train, Model()), variables, far)
    assert_same(replaced, ours, 0)
    with pytest.raises(AssertionError):  # there is a difference to see
        assert_same(replaced, flax, 1e-2)
    assert_same(everything(partial(train, Model()), variables, far), flax, 0)


def test_an_error_inside_leaves_flax_as_it_was(x):
    variables = start(nn.BatchNorm(), x)
    flax = train(nn.BatchNorm(), variables, x + 1e4)
    with pytest.raises(KeyError), replace_batch_norm():
        raise KeyError
    assert_same(train(nn.BatchNorm(), variables, x + 1e4), flax, 0)


@nn.jit
class Compiled(nn.Module):
    """Its class is compiled, once for all its instances."""

    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=False)(x)


@pytest.mark.parametrize("first", ["inside", "outside"])
@pytest.mark.parametrize("model", [nn.BatchNorm(False), Compiled()])
def test_compiled_functions_are_traced_anew_inside_and_outside(model, first, x):
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


def test_as_a_decorator(x):
    x, layer = x + 1e4, nn.BatchNorm()
    variables = start(layer, x)
    decorated = jax.jit(replace_batch_norm()(partial(train, layer)))
    for _ in range(2):
        assert_same(decorated(variables, x), train(BatchNorm(), variables, x), 1e-5)


def test_forward_mode(x):
    """Refused by the closed form; `autodiff="jax"` has it, and so has Flax."""
    variables, tangent = start(BatchNorm(), x), jnp.cos(x)

    def tangents(layer):
        return jax.jvp(lambda x: train(layer, variables, x), (x,), (tangent,))

    expected = tangents(nn.BatchNorm())
    assert_same(tangents(BatchNorm(autodiff="jax")), expected, 1e-5)
    with replace_batch_norm(autodiff="jax"):
        assert_same(tangents(nn.BatchNorm()), expected, 1e-5)
    with pytest.raises(TypeError, match="custom_vjp"):
        tangents(BatchNorm())
    with pytest.raises(ValueError, match="autodiff must be one of"):
        tangents(BatchNorm(autodiff="forward"))


def test_ours_are_left_as_they_are(x):
    """Options that Flax does not have survive inside."""
    layer = BatchNorm(unbiased=True)
    variables = start(layer, x)
    with replace_batch_norm():
        inside = train(layer, variables, x)
    assert_same(inside, train(layer, variables, x), 0)


def test_importing_the_package_is_enough():
    assert jaxbn.linen.BatchNorm is BatchNorm
