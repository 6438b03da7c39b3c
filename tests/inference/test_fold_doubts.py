"""Folding leaves a pair of which it cannot be sure, and gives the model's own dtype."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax_helpers import assert_same, randomize, randomize_for_inference, with_warnings
from helpers import assert_near
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import jaxbn
from jaxbn.linen import skip_folded

pytestmark = pytest.mark.usefixtures("standard_promotion")
BF16: Any = jnp.bfloat16
NO_AXES: Any = None
OTHER = "computes something else than Flax's layer does with its variables"


@pytest.fixture(params=[False, True], ids=["", "remat3"])
def remat3(request):
    """Run under the flag, too, that is declared the coming default."""
    jax.config.update("jax_remat3", request.param)
    yield request.param
    jax.config.update("jax_remat3", False)


def fold_linen(rng, model, x, tolerance=1e-5):
    """Fold, check output and dtype, and return the norms that stay and the reasons."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    variables = randomize(rng, shapes)
    before = jax.tree.map(jnp.copy, variables)
    folded, caught = with_warnings(jaxbn.linen.fold, model, variables, x)
    assert_same(variables, before, 0)
    expected = model.apply(variables, x)
    with skip_folded():
        check_output(model.apply(folded, x), expected, tolerance)
        assert_same(model.apply(variables, x), expected, 0)
    left = len(jax.tree.leaves(folded["batch_stats"])) // 2
    return left, "\n".join(str(w.message) for w in caught)


def fold_nnx(rng, model, x, tolerance=1e-5):
    randomize_for_inference(rng, model)
    before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model)))
    folded, caught = with_warnings(jaxbn.nnx.fold, model, x)
    assert_same(nnx.to_pure_dict(nnx.state(model)), before, 0)
    check_output(folded(x), model(x), tolerance)
    nodes = nnx.iter_graph(folded, graph=True)
    left = sum(isinstance(node, nnx.BatchNorm) for _, node in nodes)
    return left, "\n".join(str(w.message) for w in caught)


def check_output(actual, expected, tolerance):
    for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        assert a.dtype == b.dtype
        assert_near(a, b, tolerance)


def normal(rng, *shape, dtype: Any = jnp.float32):
    return jnp.asarray(rng.normal(size=shape), dtype)


class Called(nn.Module):
    """Call a function of the module, which makes layers."""

    function: Any

    @nn.compact
    def __call__(self, x):
        return self.function(x)


# Names, which JAX is about to bind another way.


def test_linen_fold_sees_through_names_and_remat(remat3, rng):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = checkpoint_name(nn.Dense(4)(x), "hidden")
            x = nn.remat(nn.Dense)(3)(nn.relu(nn.BatchNorm(True)(x)))
            return nn.remat(jaxbn.linen.BatchNorm)(True)(x)

    assert fold_linen(rng, Model(), normal(rng, 5, 3)) == (0, "")


class NNXModel(nnx.Module):
    """Hold a linear layer and a norm; `function` calls them."""

    def __init__(self, function, norm=nnx.BatchNorm, linear=nnx.Linear, **options):
        rngs = nnx.Rngs(0)
        self.function = function
        self.linear = linear(3, 3, rngs=rngs, **options)
        self.norm = norm(3, rngs=rngs)

    def __call__(self, x):
        return self.function(self, x)


def test_nnx_fold_sees_through_names_and_remat(remat3, rng):
    def call(model, x):
        apply = nnx.remat(lambda layer, x: layer(x))
        h = checkpoint_name(apply(model.linear, x), "hidden")
        return apply(model.norm, h)

    assert fold_nnx(rng, NNXModel(call), normal(rng, 5, 3)) == (0, "")


def test_marks_survive_transformations_of_the_model(rng):
    def call(model, x):
        return jax.vmap(jax.jit(lambda x: model.norm(model.linear(x))))(x)

    assert fold_nnx(rng, NNXModel(call), normal(rng, 5, 3)) == (0, "")


def test_fold_sees_through_sharding_constraints(rng):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))

    def constrain(x):
        return lax.with_sharding_constraint(x, sharding)

    model = nn.Sequential([nn.Dense(4), constrain, nn.BatchNorm(True)])
    assert fold_linen(rng, model, normal(rng, 5, 3)) == (0, "")

    def call(model, x):
        return model.norm(constrain(model.linear(x)))

    assert fold_nnx(rng, NNXModel(call), normal(rng, 5, 3)) == (0, "")


# Weights that are not the variables.


class StandardDense(nn.Dense):
    """Standardize the kernel."""

    def param(self, name, *args, **kwargs):
        value = super().param(name, *args, **kwargs)
        return (
            (value - value.mean(0, keepdims=True)) / value.std()
            if name == "kernel"
            else value
        )


class OffsetNorm(nn.BatchNorm):
    def param(self, name, *args, **kwargs):
        value = super().param(name, *args, **kwargs)
        return value + 1 if name == "scale" else value


class OffsetMean(nn.BatchNorm):
    def variable(self, collection, name, *args, **kwargs):
        variable: Any = super().variable(collection, name, *args, **kwargs)
        other: Any = SimpleNamespace(value=variable.value + 1)
        return other if name == "mean" else variable


class Beside(nn.BatchNorm):
    """Add a bias of its own, of the name that the layer would have used."""

    use_bias: bool = False

    @nn.compact
    def __call__(self, x, *args, **kwargs):
        bias = self.param("bias", nn.initializers.ones, x.shape[-1:])
        return super().__call__(x, *args, **kwargs) + bias[None]


LINEN_WRONG = {
    "standardized kernel": (StandardDense(4), nn.BatchNorm(True), OTHER),
    "standardized kernel, no bias": (
        StandardDense(4, use_bias=False), nn.BatchNorm(True), "has no bias, but code"
    ),
    "scale + 1": (nn.Dense(4), OffsetNorm(True), OTHER),
    "mean + 1": (nn.Dense(4), OffsetMean(True), OTHER),
    "its own bias": (nn.Dense(4), Beside(True), "has other variables than a batch"),
    "spectral norm": (
        nn.SpectralNorm(nn.Dense(4)), nn.BatchNorm(True), "is computed in the call"
    ),
    "weight norm": (
        nn.WeightNorm(nn.Dense(4)), nn.BatchNorm(True), "is computed in the call"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LINEN_WRONG)
def test_linen_fold_leaves_layers_with_other_weights(name, rng):
    layer, norm, reason = LINEN_WRONG[name]

    class Model(nn.Module):
        layer: Any
        norm: Any

        @nn.compact
        def __call__(self, x):
            options: Any = {"update_stats": False} if "spectral" in name else {}
            return self.norm(self.layer(x, **options))

    left, reasons = fold_linen(rng, Model(layer, norm), normal(rng, 5, 3))
    assert left
    assert reason in reasons


def test_linen_fold_leaves_mapped_variables(rng):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            def double(tree):
                return jax.tree.map(lambda a: 2 * a, tree)

            dense = nn.map_variables(nn.Dense, "params", double, init=True)(4)
            return nn.BatchNorm(True)(dense(x))

    left, reasons = fold_linen(rng, Model(), normal(rng, 5, 3))
    assert left == 1
    assert "is computed in the call" in reasons


def test_linen_fold_leaves_layers_that_other_code_replaces(rng):
    def double(next_call, args, kwargs, context):
        y = next_call(*args, **kwargs)
        return 2 * y if isinstance(context.module, nn.Dense) else y

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            with nn.intercept_methods(double):
                return nn.BatchNorm(True)(nn.Dense(4)(x))

    left, reasons = fold_linen(rng, Model(), normal(rng, 5, 3))
    assert left == 1
    assert OTHER in reasons
    with nn.intercept_methods(double):
        model = nn.Sequential([nn.Dense(4), nn.BatchNorm(True)])
        left, _ = fold_linen(rng, model, normal(rng, 5, 3))
        assert left == 1


class PropertyLinear(nnx.Linear):
    """Compute the kernel from another Variable."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.v = nnx.Param(2 * self.v[...])

    @property
    def kernel(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        return nnx.Param(self.v[...] / jnp.linalg.norm(self.v[...]))

    @kernel.setter
    def kernel(self, value):
        self.v = value


class SpyLinear(nnx.Linear):
    def __getattribute__(self, name):
        value = super().__getattribute__(name)
        return nnx.Param(2 * value[...]) if name == "kernel" else value


class OffsetNNXNorm(nnx.BatchNorm):
    def __getattribute__(self, name):
        value = super().__getattribute__(name)
        return nnx.Param(1 + value[...]) if name == "scale" else value


class Half(nnx.Param):
    """Halve what is read."""

    def __getitem__(self, key):
        return super().__getitem__(key) / 2


class HalfLinear(nnx.Linear):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.kernel = Half(self.kernel[...])


def plain_call(model, x):
    return model.norm(model.linear(x))


NNX_WRONG = {
    "property": (PropertyLinear, nnx.BatchNorm),
    "__getattribute__": (SpyLinear, nnx.BatchNorm),
    "scale + 1": (nnx.Linear, OffsetNNXNorm),
    "Variable": (HalfLinear, nnx.BatchNorm),
}


@pytest.mark.parametrize("name", NNX_WRONG)
def test_nnx_fold_leaves_layers_with_other_weights(name, rng):
    linear, norm = NNX_WRONG[name]
    model = NNXModel(plain_call, norm, linear)
    left, reasons = fold_nnx(rng, model, normal(rng, 5, 3))
    assert left == 1
    assert OTHER in reasons or "is computed in the call" in reasons


@pytest.mark.parametrize("wrapper", [nnx.WeightNorm, nnx.SpectralNorm])
def test_nnx_fold_leaves_wrapped_layers(wrapper, rng):
    rngs = nnx.Rngs(0)
    wrapped = wrapper(nnx.Linear(3, 3, rngs=rngs), rngs=rngs)

    class Model(nnx.Module):
        def __init__(self):
            self.wrapped, self.norm = wrapped, nnx.BatchNorm(3, rngs=rngs)

        def __call__(self, x):
            options = {"update_stats": False} if wrapper is nnx.SpectralNorm else {}
            return self.norm(self.wrapped(x, **options))

    left, _ = fold_nnx(rng, Model(), normal(rng, 5, 3))
    assert left == 1


def test_fold_leaves_layers_of_whose_call_more_is_used(rng):
    def call(model, x):
        y, change = jax.jvp(lambda x: model.linear(x), (x,), (jnp.cos(x),))
        return model.norm(y) + change

    left, reasons = fold_nnx(rng, NNXModel(call), normal(rng, 5, 3))
    assert left == 1
    assert "an array in the call of 'linear' is used outside" in reasons


def test_fold_takes_a_derivative_of_both_layers(rng):
    def call(model, x):
        both = lambda x: model.norm(model.linear(x))  # noqa: E731
        return sum(jax.jvp(both, (x,), (jnp.cos(x),)))

    left, _ = fold_nnx(rng, NNXModel(call), normal(rng, 5, 3))
    assert left <= 1


# Axes that are mapped, and stacks.


class Mapped(nn.Module):
    """Map a layer, and a norm, along these axes of the data, with stacked weights."""

    layer_axis: int | None
    norm_axis: int | None
    stacked: bool = True
    after: bool = True
    features: int = 3

    @nn.compact
    def __call__(self, x):
        layer = self.lift(nn.Dense, self.layer_axis)(self.features)
        norm = self.lift(nn.BatchNorm, self.norm_axis)(True)
        return norm(layer(x)) if self.after else layer(norm(x))

    def lift(self, kind, axis) -> Any:
        if axis is None:
            return kind
        axes: Any = {"params": 0, "batch_stats": 0} if self.stacked else {
            "params": None, "batch_stats": None
        }  # fmt: skip
        split: Any = {"params": self.stacked}
        return nn.vmap(
            kind, in_axes=axis, out_axes=axis, variable_axes=axes, split_rngs=split
        )


APART = "are mapped along different axes of the array between"


@pytest.mark.parametrize("after", [True, False])
@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize(
    ("layer_axis", "norm_axis"), [(None, -1), (0, 1), (1, 0), (None, 0), (0, None)]
)
def test_linen_fold_leaves_pairs_mapped_apart(
    layer_axis, norm_axis, stacked, after, rng
):
    model = Mapped(layer_axis, norm_axis, stacked, after)
    left, reasons = fold_linen(rng, model, normal(rng, 3, 3, 3))
    assert left == 1
    # Some of these transpose the array between.
    assert APART in reasons or "not the output of a linear layer itself" in reasons


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("after", [True, False])
@pytest.mark.parametrize("stacked", [True, False])
def test_linen_fold_takes_pairs_mapped_alike(axis, after, stacked, rng):
    model = Mapped(axis, axis, stacked, after)
    left, reasons = fold_linen(rng, model, normal(rng, 3, 3, 3))
    # With axis=1 `vmap` itself may transpose the array between.
    assert left == 0 or (axis == 1 and reasons)


def test_linen_fold_takes_other_sizes_of_mapped_axes(rng):
    model = Mapped(None, -1, features=5)
    left, reasons = fold_linen(rng, model, normal(rng, 3, 5, 7))
    assert left == 1
    assert APART in reasons


NNX_MAPPED = {
    "norm behind": lambda m, x: jax.vmap(m.norm, -1, -1)(m.linear(x)),
    "norm in front": lambda m, x: jax.vmap(m.norm, 0, 0)(m.linear(x)),
    "layer in front": lambda m, x: m.norm(jax.vmap(m.linear)(x)),
    "apart": lambda m, x: jax.vmap(m.norm, 1, 1)(jax.vmap(m.linear)(x)),
    "before, behind": lambda m, x: m.linear(jax.vmap(m.norm, -1, -1)(x)),
}


@pytest.mark.parametrize("name", NNX_MAPPED)
def test_nnx_fold_leaves_pairs_mapped_apart(name, rng):
    left, reasons = fold_nnx(rng, NNXModel(NNX_MAPPED[name]), normal(rng, 3, 3, 3))
    assert left == 1
    assert (APART in reasons) == (name != "before, behind")  # which transposes


def nested_vmap(kind, inner, outer):
    nothing: Any = None
    split: Any = {"params": True}
    for axes in (inner, outer):
        kind = nn.vmap(
            kind, in_axes=nothing, axis_size=2, variable_axes=axes, split_rngs=split
        )
    return kind


class Pair(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(True)(nn.Dense(3)(x))


@pytest.mark.parametrize("axis", [0, 1])
def test_linen_fold_leaves_stacks_in_both_orders(axis, rng):
    inner, outer = {"params": 0, "batch_stats": 0}, {"params": 0, "batch_stats": axis}
    model = nested_vmap(Pair, inner, outer)()
    left, reasons = fold_linen(rng, model, normal(rng, 5, 3))
    assert left == 1
    assert "in nested stacks" in reasons


class NNXStacked(nnx.Module):
    """Hold a stack of 3 layers and a stack of 3 norms; `function` calls them."""

    def __init__(self, function):
        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def make(rngs):
            return nnx.Linear(3, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs)

        self.linear, self.norm = make(nnx.Rngs(0))
        self.function = function

    def __call__(self, x):
        return self.function(self, x)


def call_each(layer, x, axis=0):
    return nnx.vmap(lambda m, x: m(x), in_axes=(0, axis), out_axes=axis)(layer, x)


def map_layers(function, layer):
    """Map a function over the layers of a stack, as `jax.vmap` does."""
    graphdef, state = nnx.split(layer)
    return jax.vmap(lambda state: function(nnx.merge(graphdef, state)))(state)


def loop_layers(function, layer):
    """Apply a function to one layer of a stack after the other."""
    graphdef, state = nnx.split(layer)
    return lax.map(lambda state: function(nnx.merge(graphdef, state)), state)


def nest(outer, inner):
    """Pass the output of each layer to all norms."""

    def call(model, x):
        def apply(layer):
            y = layer(x)
            return inner(lambda norm: norm(y), model.norm)

        return outer(apply, model.linear)

    return call


STACKED = {
    "alike": (lambda m, x: call_each(m.norm, call_each(m.linear, x)), 0, ""),
    "apart": (lambda m, x: call_each(m.norm, call_each(m.linear, x), 1), 1, APART),
    "loop in loop": (nest(loop_layers, loop_layers), 1, "has another use"),
    "vmap in vmap": (nest(map_layers, map_layers), 1, "in nested stacks"),
    "scan in vmap": (nest(map_layers, loop_layers), 1, "has another use"),
}


@pytest.mark.parametrize("name", STACKED)
def test_nnx_fold_pairs_stacks_by_the_data(name, rng):
    function, expected, reason = STACKED[name]
    left, reasons = fold_nnx(rng, NNXStacked(function), normal(rng, 3, 3, 3))
    assert (left, reason in reasons) == (expected, True)


def test_nnx_fold_takes_one_stack_in_two_loops(rng):
    def call(model, x):
        def block(x, layers):
            return layers[1](layers[0](x))

        loop = nnx.scan(block, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return loop(loop(x, (model.linear, model.norm)), (model.linear, model.norm))

    assert fold_nnx(rng, NNXStacked(call), normal(rng, 5, 3)) == (0, "")


# What `skip_folded` leaves as it is.


class OwnBias(nn.Dense):
    """Add a bias of its own, twice."""

    use_bias: bool = False

    @nn.compact
    def __call__(self, inputs):
        bias = self.param("bias", nn.initializers.ones, (self.features,))
        return super().__call__(inputs) + 2 * bias[None]


class LaterBias(nn.Dense):
    """Have a bias for other calls."""

    use_bias: bool = False

    def setup(self):
        self.later = self.param("bias", nn.initializers.ones, (self.features,))


class BiasOf(nn.Module):
    """Add a bias to the output of a layer, whose scope it shares."""

    layer: nn.Module

    def setup(self):
        nn.share_scope(self, self.layer)
        self.bias = self.param("bias", nn.initializers.ones, (4,))

    def __call__(self, x):
        return self.layer(x) + self.bias[None]


class Sharing(nn.Module):
    """Let a norm share the scope of a layer, or the layer the norm's."""

    reverse: bool = False

    def setup(self):
        self.dense = nn.Dense(4, use_bias=False)
        self.norm = nn.BatchNorm(True)
        both = self.dense, self.norm
        nn.share_scope(*(both[::-1] if self.reverse else both))

    def __call__(self, x):
        return self.norm(nn.relu(self.dense(x)))


class SharingDirectly(Sharing):
    def __call__(self, x):
        return self.norm(self.dense(x))


NO_BIAS = nn.Dense(4, use_bias=False)
OTHERS = {
    "its own": lambda: OwnBias(4),
    "shared with a norm": Sharing,
    "shared by a norm": lambda: Sharing(reverse=True),
    "shared with its norm": SharingDirectly,
    "shared by its norm": lambda: SharingDirectly(reverse=True),
    "shared with a parent": lambda: BiasOf(NO_BIAS),
}


@pytest.mark.parametrize("name", OTHERS)
def test_skip_folded_leaves_layers_that_were_not_folded(name, rng):
    pair = [nn.BatchNorm(True), nn.Dense(4, use_bias=False), nn.BatchNorm(True)]
    model = nn.Sequential([*pair, OTHERS[name](), nn.BatchNorm(True)])
    left, _ = fold_linen(rng, model, normal(rng, 5, 3))
    assert 1 <= left <= 2


def test_skip_folded_skips_no_norm_without_its_statistics(rng):
    model = nn.Sequential([nn.Dense(4), nn.BatchNorm(True)])
    x = normal(rng, 5, 3)
    variables = model.init(jax.random.key(0), x)
    with skip_folded(), pytest.raises(Exception, match="batch_stats"):
        model.apply({"params": variables["params"]}, x)


# Dtypes.


def typed(layer: Any, norm: Any):
    """Return a layer and a norm with `dtype`, `param_dtype` each."""
    names = "dtype", "param_dtype"
    return (
        nn.Dense(3, **dict(zip(names, layer, strict=True))),
        nn.BatchNorm(True, **dict(zip(names, norm, strict=True))),
    )


F32: Any = jnp.float32
TOLERANCES = 1e-5, 2e-2  # of y's largest, without and with bfloat16
DTYPES = {  # dtype and param_dtype of the layer and of the norm, of x; do norms stay?
    "all float32": ((None, F32), (None, F32), F32, False),
    "all bfloat16": ((None, BF16), (None, BF16), BF16, False),
    "computed in bfloat16": ((BF16, F32), (BF16, F32), F32, False),
    "to float32": ((None, BF16), (None, F32), BF16, False),
    "float32 again": ((BF16, F32), (None, F32), F32, True),
    "to bfloat16": ((None, F32), (BF16, F32), F32, True),
    "to float16": ((BF16, F32), (jnp.float16, F32), F32, True),
    "from integers": ((None, F32), (None, F32), jnp.int32, False),
}


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("after", [True, False])
def test_linen_fold_keeps_the_dtype(name, after, rng):
    *options, dtype, stays = DTYPES[name]
    layer, norm = typed(*options)
    model = nn.Sequential([layer, norm] if after else [norm, layer])
    x = jnp.asarray(3 * rng.normal(size=(5, 3)), dtype)
    left, reasons = fold_linen(rng, model, x, TOLERANCES[BF16 in np.ravel(options)])
    if after:
        assert left == stays
    assert left == ("give both layers the same dtype" in reasons)


class Residual(nn.Module):
    """Add a block to a carry."""

    layer: Any
    norm: Any

    @nn.compact
    def __call__(self, x, _):
        layer, norm = typed(self.layer, self.norm)
        return (x + norm(layer(x))).astype(x.dtype), None


@pytest.mark.parametrize("name", ["all float32", "all bfloat16", "to bfloat16"])
def test_linen_fold_keeps_the_dtype_of_a_carry(name, rng):
    layer, norm, dtype, stays = DTYPES[name]
    scan: Any = nn.scan(
        Residual,
        length=2,
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True},
    )

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return scan(layer, norm)(x, None)[0]

    left, _ = fold_linen(rng, Model(), normal(rng, 5, 3, dtype=dtype), 2e-2)
    assert left == stays


def with_dtypes(function, layer, norm):
    rngs = nnx.Rngs(0)
    model = NNXModel(function)
    model.linear = nnx.Linear(3, 3, dtype=layer[0], param_dtype=layer[1], rngs=rngs)
    model.norm = nnx.BatchNorm(3, dtype=norm[0], param_dtype=norm[1], rngs=rngs)
    return model


@pytest.mark.parametrize("name", DTYPES)
def test_nnx_fold_keeps_the_dtype(name, rng):
    layer, norm, dtype, stays = DTYPES[name]
    model = with_dtypes(plain_call, layer, norm)
    x = jnp.asarray(3 * rng.normal(size=(5, 3)), dtype)
    left, reasons = fold_nnx(rng, model, x, TOLERANCES[BF16 in (*layer, *norm)])
    assert left == stays
    assert left == ("give both layers the same dtype" in reasons)


NNX_FLOWS = {
    "cond": lambda m, x: nnx.cond(
        x.sum() > 0, lambda m, x: m.norm(m.linear(x)), lambda m, x: x.astype(BF16), m, x
    ),
    "fori_loop": lambda m, x: nnx.fori_loop(
        0, 2, lambda i, a: (a[0], a[0].norm(a[0].linear(a[1]))), (m, x.astype(BF16))
    )[1],
}


@pytest.mark.parametrize("name", NNX_FLOWS)
def test_nnx_fold_keeps_the_dtype_in_branches_and_loops(name, rng):
    model = with_dtypes(NNX_FLOWS[name], (None, F32), (BF16, F32))
    left, _ = fold_nnx(rng, model, normal(rng, 5, 3), 2e-2)
    assert left == 1


def test_fold_casts_weights_that_would_widen_the_output(rng):
    model = with_dtypes(plain_call, (None, F32), (None, F32))
    model.linear.bias = nnx.Param(jnp.ones(3, BF16))
    model.linear.kernel = nnx.Param(jnp.ones((3, 3), BF16))
    options: Any = {"param_dtype": BF16, "rngs": nnx.Rngs(0)}
    model.norm = jaxbn.nnx.BatchNorm(3, dtype=BF16, **options)
    left, _ = fold_nnx(rng, model, normal(rng, 5, 3, dtype=BF16), 2e-2)
    assert left == 0


def test_fold_takes_two_norms_of_one_layer_of_one_dtype(rng):
    def layers(norm_dtype: Any):
        norms = nn.BatchNorm(True, dtype=BF16), nn.BatchNorm(True, dtype=norm_dtype)
        return [norms[0], nn.Dense(3, dtype=BF16), norms[1]]

    x = normal(rng, 5, 3)
    assert fold_linen(rng, nn.Sequential(layers(BF16)), x, 2e-2) == (0, "")
    options: Any = {"param_dtype": BF16}
    first = nn.BatchNorm(True, **options)
    mixed = [first, nn.Dense(3, **options), nn.BatchNorm(True)]
    x = normal(rng, 5, 3, dtype=BF16)
    left, reasons = fold_linen(rng, nn.Sequential(mixed), x, 2e-2)
    assert left == 1
    assert "includes a batch norm of another dtype" in reasons


def test_models_with_random_streams_fold(rng):
    """The keys of a stream are variables without a dtype of NumPy."""

    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.linear = nnx.Linear(3, 4, rngs=rngs)
            self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=rngs)

        def __call__(self, x):
            return self.dropout(self.norm(self.linear(x)))

    model, x = Model(nnx.Rngs(0)), normal(rng, 5, 3)
    model.norm.var.set_value(jnp.asarray(rng.uniform(0.5, 2, size=4), F32))
    folded = jaxbn.nnx.fold(model, x)
    assert type(folded.norm).__name__ == "FoldedBatchNorm"
    assert_near(folded(x), model(x))


def test_variables_of_other_kinds_stay_as_they_are(rng):
    """Keys and Python's numbers, in collections of the user's own."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.variable("own", "key", lambda: jax.random.key(0))
            return nn.BatchNorm(True)(nn.Dense(4)(x))

    x = normal(rng, 5, 3)
    variables: Any = Model().init(jax.random.key(1), x)
    stats = randomize(rng, variables["batch_stats"])
    variables |= {"batch_stats": stats, "own": variables["own"] | {"number": 2.0}}
    folded = jaxbn.linen.fold(Model(), variables, x)
    with skip_folded():
        y = Model().apply(folded, x)
    assert_near(y, Model().apply(variables, x))
    assert folded["own"] == variables["own"]
