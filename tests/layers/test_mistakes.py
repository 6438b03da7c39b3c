"""Test that layers tell users of mistakes, and how they read Flax's odd options."""

import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.errors import ModifyScopeVariableError
from flax_helpers import assert_same
from layer_apis import APIS

import jaxbn
import jaxbn.linen
import jaxbn.nnx

pytestmark = pytest.mark.usefixtures("standard_promotion", "unchecked_types")
C = 3


@pytest.fixture(params=APIS)
def make(request) -> Any:
    return APIS[request.param]


@pytest.fixture
def x(rng):
    return jnp.asarray(0.7 + 1.9 * rng.normal(size=(8, C)), jnp.float32)


# Flags.


@pytest.mark.parametrize("library", ["jaxbn", "renorm"])
@pytest.mark.parametrize("value", [64, 1, "no", 0.5, [True], np.ones(1, bool)])
@pytest.mark.parametrize("name", ["use_running_average", "use_bias", "unbiased"])
def test_flags_must_be_bools(name, value, library, make):
    with pytest.raises(TypeError, match=f"{name} must be a Python bool, .* no num_fea"):
        make(library, **{name: value})


@pytest.mark.parametrize("name", ["use_scale", "force_float32_reductions"])
def test_more_flags_of_linen_must_be_bools(name):
    options: Any = {name: None}
    with pytest.raises(TypeError, match=f"{name} must be a Python bool.*got None"):
        jaxbn.linen.BatchNorm(**options)


def test_number_of_features_is_no_field_of_linen():
    """PyTorch's habit: it would count as `use_running_average=64`."""
    match = "use_running_average must be a Python bool, .*; got 64. Linen's layers have"
    with pytest.raises(TypeError, match=match):
        jaxbn.linen.BatchNorm(64)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("value", [64, "eval", 0, jnp.ones(2, bool)])
def test_flags_of_a_call_must_be_bools(value, x, make):
    layer = make("jaxbn", shape=x.shape)
    calls = {
        "use_running_average": lambda: call(layer, x, value),
        "update_statistics": lambda: layer(x, update_statistics=value),
    }
    for name, run in calls.items():
        with pytest.raises(TypeError, match=f"{name} must be a Python bool"):
            run()


def call(layer, x, use_running_average):
    """Call with this value itself; `layer(x, train)` makes it a bool."""
    if hasattr(layer, "graphdef"):
        return nnx.merge(layer.graphdef, layer.variables)(x, use_running_average)
    return layer.layer.apply(
        layer.variables, x, use_running_average, mutable=["batch_stats"]
    )


def test_traced_flags_get_the_cure(x, make):
    layer = make("jaxbn", shape=x.shape)
    with pytest.raises(TypeError, match=r"got .*Tracer.*static_argnames='train'"):
        jax.jit(lambda flag: call(layer, x, flag))(True)


def test_attribute_of_nnx_is_checked_in_the_call(x):
    layer: Any = jaxbn.nnx.BatchNorm(C, rngs=nnx.Rngs(0))
    layer.use_running_average = C
    with pytest.raises(TypeError, match="use_running_average must be a Python bool"):
        layer(x)


@pytest.mark.parametrize("kind", [bool, np.bool_, np.array, jnp.array])
def test_bools_of_numpy_and_jax_are_taken(kind, x, make):
    for flag in (False, True):
        layer = make("jaxbn", shape=x.shape, unbiased=kind(flag))
        y = call(layer, x, kind(flag))
        assert_same(y, call(make("jaxbn", unbiased=flag), x, flag), 0)


def test_replaced_layers_check_their_flags(x):
    layer = nn.BatchNorm(64)  # pyright: ignore[reportArgumentType]
    with (
        pytest.raises(TypeError, match=r"use_running_average must be .*; got 64"),
        jaxbn.linen.replace_batch_norm(),
    ):
        layer.init(jax.random.key(0), x)
    options: Any = {"unbiased": "no"}
    with pytest.raises(TypeError, match=r"unbiased must be .*; got 'no'"):
        jaxbn.linen.replace_batch_norm(**options)
    with pytest.raises(TypeError, match=r"unbiased must be .*; got 'no'"):
        jaxbn.nnx.replace_batch_norm(nnx.BatchNorm(C, rngs=nnx.Rngs(0)), **options)


# linen without `mutable`.


class Lookalike(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        stats = [
            self.variable("batch_stats", name, jnp.zeros, (C,))
            for name in ("mean", "var")
        ]
        return x - stats[0].value[None]


@pytest.mark.parametrize(
    "model",
    [
        jaxbn.linen.BatchNorm(False),
        jaxbn.linen.BatchNorm(False, momentum=None),
        jaxbn.linen.BatchRenorm(False),
        nn.Sequential([nn.Dense(C), jaxbn.linen.BatchNorm(False)]),
        nn.remat(jaxbn.linen.BatchNorm)(False),
        nn.BatchNorm(False),
        Lookalike(),
    ],
    ids=["BatchNorm", "count", "BatchRenorm", "inner", "remat", "Flax's", "lookalike"],
)
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit])
def test_missing_mutable_gets_a_note(transform, model, x):
    variables = model.init(jax.random.key(0), x)
    with (
        pytest.raises(ModifyScopeVariableError) as caught,
        jaxbn.linen.replace_batch_norm(also=[Lookalike]),
    ):
        transform(model.apply)(variables, x)
    (note,) = [n for n in caught.value.__notes__ if n.startswith("jaxbn")]
    assert 'mutable=["batch_stats"]' in note
    assert "use_running_average=True" in note


# Options of Flax's that the function refuses.


@pytest.mark.parametrize("axis", [(1, -1), (1, 0, -1, -2)])
def test_repeated_axes_match_flax(axis, x):
    x = x[:, None] if len(axis) > 2 else x
    layer = nn.BatchNorm(False, axis=axis)
    variables = layer.init(jax.random.key(0), x)
    want = layer.apply(variables, x, mutable=["batch_stats"])
    own = jaxbn.linen.BatchNorm(False, axis=axis)
    assert_same(own.apply(variables, x, mutable=["batch_stats"]), want, 1e-5)
    with jaxbn.linen.replace_batch_norm():
        assert_same(layer.apply(variables, x, mutable=["batch_stats"]), want, 1e-5)


def test_repeated_axes_of_nnx_match_flax(x):
    kinds: Any = jaxbn.nnx.BatchNorm, nnx.BatchNorm
    layers = [kind(C, axis=(1, -1), momentum=0.8, rngs=nnx.Rngs(0)) for kind in kinds]
    results = [(layer(x), layer.mean[...], layer.var[...]) for layer in layers]
    assert_same(results[0], results[1], 1e-5)


def test_no_axis_and_momenta_beyond_1_are_errors(x, make):
    match = r"axis must name a feature axis, unlike in Flax; got axis=\(\).*x\[\.\.\."
    layer = jaxbn.linen.BatchNorm(False, axis=())
    with pytest.raises(ValueError, match=match):
        layer.init(jax.random.key(0), x)
    for momentum in (1.5, -0.1):
        with pytest.raises(ValueError, match=r"momentum must lie in \[0, 1\].*PyTorch"):
            make("jaxbn", momentum=momentum)(x)


# One element of each feature.


class Flattened(nn.Module):
    kind: Any

    @nn.compact
    def __call__(self, x):
        return self.kind(use_running_average=False)(x.reshape(len(x), -1))


@pytest.mark.parametrize("kind", [jaxbn.linen.BatchNorm, nn.BatchNorm])
def test_linen_warns_of_single_elements_in_training_alone(kind, x, caplog):
    """Models are initialized with a batch of one. Elsewhere a log takes the warning."""
    model = Flattened(kind)
    with jaxbn.linen.replace_batch_norm():
        variables = model.init(jax.random.key(0), x[:1])
        bridge = nnx.bridge.ToNNX(model, rngs=nnx.Rngs(0))
        nnx.bridge.lazy_init(bridge, x[:1])
        model.apply(variables, x, mutable=["batch_stats"])
        assert not caplog.records
        with pytest.warns(UserWarning, match="needs more than one element"):
            model.apply(variables, x[:1], mutable=["batch_stats"])


def test_nnx_warns_of_single_elements(x, caplog):
    layer: Any = jaxbn.nnx.BatchNorm(C, rngs=nnx.Rngs(0))
    layer(x[:1], use_running_average=True)
    assert not caplog.records
    with pytest.warns(UserWarning, match="needs more than one element"):
        layer(x[:1])


@pytest.mark.usefixtures("unchecked_types")
def test_the_warning_names_the_user_s_line():
    """In a process of its own: the checks of types in tests add frames."""
    code = (
        "import warnings, jax, jax.numpy as jnp, jaxbn.linen\n"
        "layer, x = jaxbn.linen.BatchNorm(False), jnp.ones((1, 2))\n"
        "variables = layer.init(jax.random.key(0), x)\n"
        "with warnings.catch_warnings(record=True) as record:\n"
        "    for _ in range(3):\n"
        "        layer.apply(variables, x, mutable=['batch_stats'])\n"
        "print([w.lineno for w in record])\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert out.stdout == "[6]\n"
