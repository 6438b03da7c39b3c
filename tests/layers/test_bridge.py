"""Models that hold layers of the other API, by `flax.nnx.bridge`.

The same model without a bridge gives the expected values.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax_helpers import assert_same, everything, randomize

import jaxbn

pytestmark = pytest.mark.usefixtures("standard_promotion")
C = 3
STATS = ["batch_stats"]
ToNNX, to_linen = nnx.bridge.ToNNX, nnx.bridge.to_linen


class LinenModel(nn.Module):
    momentum: float = 0.9

    @nn.compact
    def __call__(self, x, train: bool = True):
        x = nn.Dense(C, use_bias=False)(x)
        return jnp.sin(nn.BatchNorm(not train, momentum=self.momentum)(x))


class NNXModel(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.dense = nnx.Linear(C, C, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(C, momentum=0.9, rngs=rngs)

    def __call__(self, x, train: bool = True):
        return jnp.sin(self.norm(self.dense(x), use_running_average=not train))


class Outer(nnx.Module):
    """An nnx model with a linen model in it, and a batch norm of its own."""

    def __init__(self, bridge: nnx.bridge.ToNNX):
        self.parts = nnx.List([bridge])
        self.norm = nnx.BatchNorm(C, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.norm(self.parts[0](x, mutable=STATS))


class OuterLinen(nn.Module):
    """A linen model with an nnx model in it, and a batch norm of its own."""

    @nn.compact
    def __call__(self, x):
        x = to_linen(NNXModel, name="inner")(x)
        return nn.BatchNorm(use_running_average=False)(x)


class Subclass(nnx.bridge.ToNNX):
    def __call__(self, x, **options):
        return super().__call__(2 * x, **options) / 2


@pytest.fixture
def x(rng):
    # A mean at which Flax's fast variance is wrong: a layer of Flax is noticed.
    return jnp.asarray(1e3 + rng.normal(size=(16, C)), jnp.float32)


def linen_variables(model: nn.Module = LinenModel()) -> Any:  # noqa: B008
    """Return random variables, the same in each call."""
    variables = model.init(jax.random.key(0), jnp.ones((2, C)))
    return randomize(np.random.default_rng(1), variables)


def bridge_of(variables, kind: type[nnx.bridge.ToNNX] = ToNNX, **options) -> Any:
    """Return the linen model as an nnx model with these variables."""
    model = kind(LinenModel(**options), rngs=nnx.Rngs(0)).lazy_init(jnp.ones((2, C)))
    for collection in variables.values():
        nnx.update(model, collection)
    return model


def variables_of(model) -> dict[str, Any]:
    kinds = {"params": nnx.Param, "batch_stats": nnx.BatchStat}
    return {name: nnx.to_pure_dict(nnx.state(model, k)) for name, k in kinds.items()}


def linen_step(variables, x):
    """Call the linen model that is not bridged, by jaxbn."""
    with jaxbn.linen.replace_batch_norm():
        return LinenModel().apply(variables, x, mutable=STATS)


def nnx_step(variables, x):
    """Call the nnx model that is not bridged, by jaxbn."""
    model = jaxbn.nnx.replace_batch_norm(NNXModel(nnx.Rngs(0)))
    for collection in variables.values():
        nnx.update(model, collection)
    y = model(x)
    return y, {"batch_stats": variables_of(model)["batch_stats"]}


def pure_step(model):
    """Return a function of variables and x that calls a copy of a bridged model."""

    def step(variables, x):
        copy = nnx.clone(model)
        for collection in variables.values():
            nnx.update(copy, collection)
        y = copy(x, mutable=STATS)
        return y, {"batch_stats": variables_of(copy)["batch_stats"]}

    return step


# Linen in nnx.


def test_replaced_linen_model_equals_linen(x):
    variables = linen_variables()
    model = bridge_of(variables)
    before = everything(pure_step(model), variables, x)
    expected = everything(linen_step, variables, x)
    assert jaxbn.nnx.replace_batch_norm(model) is model
    assert isinstance(model, ToNNX)
    assert_same(everything(pure_step(model), variables, x), expected, 1e-6)
    jitted = everything(jax.jit(pure_step(model)), variables, x)
    assert_same(jitted, expected, 2e-4)
    with pytest.raises(AssertionError):
        assert_same(before, expected, 1e-2)  # the data tell Flax's layer apart
    assert type(jaxbn.nnx.restore_batch_norm(model)) is ToNNX
    assert_same(everything(pure_step(model), variables, x), before, 0)


@pytest.mark.parametrize("kind", [ToNNX, Subclass])
def test_replaced_parts_equal_linen(kind, x):
    variables = linen_variables()
    model = Outer(bridge_of(variables, kind))
    jaxbn.nnx.replace_batch_norm(jaxbn.nnx.replace_batch_norm(model))
    factor = 2 if kind is Subclass else 1
    inner, updates = linen_step(variables, factor * x)
    expected = jaxbn.nnx.BatchNorm(C, rngs=nnx.Rngs(0))(inner / factor)
    assert_same(nnx.jit(lambda model, x: model(x))(model, x), expected, 1e-5)
    actual = variables_of(model.parts[0])["batch_stats"]
    assert_same(actual, updates["batch_stats"], 1e-6)
    jaxbn.nnx.restore_batch_norm(model)
    assert type(model.parts[0]) is kind


def test_autodiff_reaches_linen_model(x):
    model = bridge_of(linen_variables())
    jaxbn.nnx.replace_batch_norm(model, autodiff="jax")
    _, slope = jax.jvp(lambda x: pure_step(model)(variables_of(model), x)[0], [x], [x])
    assert np.isfinite(slope).all()
    jaxbn.nnx.restore_batch_norm(model)
    jaxbn.nnx.replace_batch_norm(model)
    with pytest.raises(TypeError, match="forward"):
        jax.jvp(lambda x: pure_step(model)(variables_of(model), x)[0], [x], [x])


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_population_measures_linen_model(replace, train, x):
    variables = linen_variables()
    batches = [x, 2 * x[:7], x[:3] + 1]
    want = jaxbn.linen.population(LinenModel(), variables, batches)["batch_stats"]
    whole, parts = bridge_of(variables), Outer(bridge_of(variables))
    for model in (whole, parts):
        if replace:
            jaxbn.nnx.replace_batch_norm(model)
    jaxbn.nnx.population(whole, batches, call=lambda model, x: model(x, train=train))
    jaxbn.nnx.population(parts, batches)
    for model in (whole, parts.parts[0]):
        new = variables_of(model)
        assert_same(new["params"], variables["params"], 0)
        assert_same(new["batch_stats"], want, 1e-6)
    assert not np.allclose(parts.norm.mean[...], 0, atol=1e-3)


def test_population_measures_a_linen_layer(x):
    layer: Any = ToNNX(nn.BatchNorm(True), nnx.Rngs(0)).lazy_init(x)
    jaxbn.nnx.population(layer, [x])
    np.testing.assert_allclose(layer.mean[...], x.mean(0), rtol=1e-6)


def test_mask_marks_linen_parameters():
    mask = jaxbn.nnx.batch_norm_mask(Outer(bridge_of(linen_variables())))
    norm = {"scale": True, "bias": True}
    inner = {"BatchNorm_0": norm, "Dense_0": {"kernel": False}}
    assert nnx.to_pure_dict(mask) == {"norm": norm, "parts": {0: inner}}


@pytest.mark.parametrize("pairs", [None, {"parts/0/Dense_0": "parts/0/BatchNorm_0"}])
def test_fold_refuses_linen_layers(pairs, x):
    variables = linen_variables()
    model = Outer(bridge_of(variables))
    with pytest.raises(TypeError, match=r"ToNNX at the path 'parts/0'.*skip_folded"):
        jaxbn.nnx.fold(model, x, pairs=pairs)
    # The error's advice.
    bridge = model.parts[0]
    expected = LinenModel().apply(variables, x, train=False)
    variables = {
        "params": nnx.to_pure_dict(nnx.state(bridge, nnx.Param)),
        "batch_stats": nnx.to_pure_dict(nnx.state(bridge, nnx.BatchStat)),
    }
    folded = jaxbn.linen.fold(LinenModel(), variables, x, train=False)
    with jaxbn.linen.skip_folded():
        y = LinenModel().apply(folded, x, train=False)
    assert_same(y, expected, 5e-3)  # the sine of thousands


class Beside(nnx.Module):
    """An nnx model with a linen model in it, and a linear layer and a batch norm."""

    def __init__(self, bridge: nnx.bridge.ToNNX):
        self.bridge = bridge
        self.inner = NNXModel(nnx.Rngs(0))

    def __call__(self, x):
        return self.inner(self.bridge(x, train=False), train=False)


def test_fold_takes_nnx_layers_beside_a_linen_model(x):
    model = Beside(bridge_of(linen_variables()))
    with pytest.warns(UserWarning, match="bridge: its layers are linen's"):
        folded = jaxbn.nnx.fold(model, x)
    assert type(folded.bridge) is ToNNX
    assert type(folded.inner.norm).__name__ == "FoldedBatchNorm"
    np.testing.assert_allclose(folded(x), model(x), atol=1e-5)


# nnx in linen.


def test_replaced_nnx_model_equals_nnx(x):
    model = to_linen(NNXModel)
    variables = linen_variables(model)

    def step(variables, x):
        return model.apply(variables, x, mutable=STATS)

    expected = everything(nnx_step, variables, x)
    before = everything(step, variables, x)
    with jaxbn.linen.replace_batch_norm():
        assert_same(everything(step, variables, x), expected, 1e-6)
        assert_same(everything(jax.jit(step), variables, x), expected, 2e-4)
        start = model.init(jax.random.key(0), x)
    with pytest.raises(AssertionError):
        assert_same(before, expected, 1e-2)  # the data tell Flax's layer apart
    assert_same(everything(step, variables, x), before, 0)
    assert_same(start, model.init(jax.random.key(0), x), 0)


@pytest.mark.parametrize("lift", [lambda model: model, nn.jit, nn.remat])
def test_replaced_nnx_parts_equal_nnx(lift, x):
    variables = linen_variables(OuterLinen())
    inner = {name: tree["inner"] for name, tree in variables.items()}
    middle, updates = nnx_step(inner, x)
    norm = jaxbn.linen.BatchNorm(use_running_average=False)
    outer = {name: tree["BatchNorm_0"] for name, tree in variables.items()}
    expected = norm.apply(outer, middle, mutable=STATS)[0]
    with jaxbn.linen.replace_batch_norm():
        y, new = lift(OuterLinen)().apply(variables, x, mutable=STATS)
    assert_same(y, expected, 1e-5)
    assert_same(new["batch_stats"]["inner"], updates["batch_stats"], 1e-6)


def test_nnx_in_linen_in_nnx_equals_linen(x):
    variables = linen_variables(OuterLinen())
    model = ToNNX(OuterLinen(), nnx.Rngs(0)).lazy_init(x)
    jaxbn.nnx.replace_batch_norm(model)

    def step(variables, x):
        with jaxbn.linen.replace_batch_norm():
            return OuterLinen().apply(variables, x, mutable=STATS)

    expected = everything(step, variables, x)
    assert_same(everything(pure_step(model), variables, x), expected, 1e-6)
    for collection in variables.values():
        nnx.update(model, collection)
    jaxbn.nnx.population(model, [x, 2 * x])
    want = jaxbn.linen.population(OuterLinen(), variables, [x, 2 * x])
    assert_same(variables_of(model)["batch_stats"], want["batch_stats"], 1e-6)


def test_autodiff_reaches_nnx_model(x):
    model = to_linen(NNXModel)
    variables = linen_variables(model)

    def slope():
        step = lambda x: model.apply(variables, x, mutable=STATS)  # noqa: E731
        return jax.jvp(step, [x], [x])[1][0]

    with jaxbn.linen.replace_batch_norm(autodiff="jax"):
        assert np.isfinite(slope()).all()
    with (
        jaxbn.linen.replace_batch_norm(),
        pytest.raises(TypeError, match="forward"),
    ):
        slope()


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.filterwarnings("error")
def test_population_measures_nnx_model(replace, x):
    model = to_linen(NNXModel)
    variables = linen_variables(model)
    batches = [x, 2 * x[:7], x[:3] + 1]
    plain = NNXModel(nnx.Rngs(0))
    nnx.update(plain, variables["params"])
    jaxbn.nnx.population(plain, batches)
    want = variables_of(plain)["batch_stats"]
    outer = linen_variables(OuterLinen())
    for name in variables:
        outer[name]["inner"] = variables[name]
    new = jaxbn.linen.population(model, variables, batches)
    if replace:
        with jaxbn.linen.replace_batch_norm():
            new = jaxbn.linen.population(model, variables, batches)
    new_outer = jaxbn.linen.population(OuterLinen(), outer, batches)["batch_stats"]
    assert_same(new["params"], variables["params"], 0)
    assert_same(new["batch_stats"], want, 1e-6)
    assert_same(new_outer["inner"], want, 1e-6)
    old = outer["batch_stats"]["BatchNorm_0"]["mean"]
    assert not np.allclose(new_outer["BatchNorm_0"]["mean"], old)


def test_mask_marks_nnx_parameters():
    mask = jaxbn.linen.batch_norm_mask(linen_variables(OuterLinen()))
    norm = {"scale": True, "bias": True}
    inner = {"dense": {"kernel": False}, "norm": norm}
    assert mask == {"BatchNorm_0": norm, "inner": inner}


def test_skip_folded_refuses_nnx_layers(x):
    class Inference(nn.Module):
        make: Any

        @nn.compact
        def __call__(self, x):
            return to_linen(self.make, name="inner")(x, train=False)

    model = Inference(NNXModel)
    variables = linen_variables(model)
    expected = model.apply(variables, x)
    folded = jaxbn.linen.fold(model, variables, x, pairs={"inner/dense": "inner/norm"})
    with pytest.warns(UserWarning, match="inner/norm: it is of an nnx module"):
        assert_same(jaxbn.linen.fold(model, variables, x), variables, 0)
    with jaxbn.linen.skip_folded():
        np.testing.assert_array_equal(model.apply(variables, x), expected)
        model.init(jax.random.key(0), x)
        with pytest.raises(TypeError, match=r"NNXModel at .*'inner'.*its 'norm'"):
            model.apply(folded, x)
    # The error's advice.
    pairs = {"dense": "norm"}
    model = Inference(
        lambda rngs: jaxbn.nnx.fold(NNXModel(rngs), x, pairs=pairs, train=False)
    )
    y = model.apply(folded, x)
    assert_same(y, expected, 5e-3)  # the sine of thousands


# Modules of the bridge that make their layers in each call.


class Compact(nnx.bridge.Module):
    norm: Any = nnx.BatchNorm

    @nnx.bridge.compact
    def __call__(self, x):
        return nnx.bridge.nnx_in_bridge_mdl(lambda rngs: self.norm(C, rngs=rngs))(x)


@pytest.mark.parametrize(
    "function",
    [
        jaxbn.nnx.replace_batch_norm,
        jaxbn.nnx.restore_batch_norm,
        jaxbn.nnx.batch_norm_mask,
        lambda model: jaxbn.nnx.population(model, [jnp.ones((2, C))]),
    ],
)
def test_modules_without_layers_are_refused(function):
    norm = nnx.BatchNorm(C, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="Compact at the path '1'"):
        function(nnx.List([norm, Compact()]))
    functional = nnx.bridge.functional(nnx.BatchNorm)(C, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="Functional"):
        function(functional)
    assert type(norm) is nnx.BatchNorm


def test_layers_of_jaxbn_work_in_bridge_modules(x):
    model = Compact(jaxbn.nnx.BatchNorm)
    y, _ = model.apply(model.init(0, x), x, mutable=True)
    expected = jaxbn.nnx.BatchNorm(C, rngs=nnx.Rngs(0))(x)
    assert_same(y, expected, 1e-6)
