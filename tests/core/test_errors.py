"""Test that each error states the rule, the wrong value and a remedy, at trace time."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from jaxbn._core import axes, sync

X = jnp.ones((4, 5, 3))

# In these tests jaxtyping's error would come before jaxbn's own.
pytestmark = pytest.mark.usefixtures("unchecked_types")


def call(x=X, train=True, features=3, params=None, state=None, **options):
    fresh_params, fresh_state = jaxbn.init(features)
    return jaxbn.batch_norm(
        params or fresh_params, state or fresh_state, x, train, **options
    )


def variables(**replaced):
    params, state = jaxbn.init(3)
    for name, value in replaced.items():
        if name in params._fields:
            params = params._replace(**{name: value})
        else:
            state = state._replace(**{name: value})
    return {"params": params, "state": state}


VALUE_ERRORS = {
    "scale": (
        variables(scale=jnp.ones(4)),
        r"params.scale must .* \(3,\) .* got \(4,\)",
    ),
    "bias": (variables(bias=jnp.ones((3, 1))), r"params.bias must .* got \(3, 1\)"),
    "mean": (variables(mean=jnp.ones(())), r"state.mean must .* got \(\).*init\(3\)"),
    "var": (variables(var=jnp.ones(5)), r"state.var must .* pass axis= where"),
    "features": ({"axis": 1}, r"shape of x's feature axes, \(5,\) .* axis=\(1,\); got"),
    "axis high": ({"axis": 3}, r"from -3 to 2; got axis=3 for x of 3 dim"),
    "axis low": ({"axis": -4}, r"from -3 to 2; got axis=-4"),
    "no axis": ({"axis": ()}, r"must name feature axes .* got axis=\(\)"),
    "axis twice": ({"axis": (2, -1)}, r"each feature axis once; got .*\(2, 2\)"),
    "momentum": ({"momentum": 1.01}, r"\[0, 1\], or be None; got 1.01.*PyTorch"),
    "momentum below": ({"momentum": -1}, r"momentum must lie in \[0, 1\]"),
    "momentum nan": ({"momentum": float("nan")}, r"got nan"),
    "epsilon": ({"epsilon": -1e-5}, r"epsilon must not be negative; got -1e-05"),
    "autodiff": ({"autodiff": "forward"}, r"\('custom_vjp', 'jax'\); got 'forward'"),
    "mask rank": (
        {"mask": np.ones((1, 4, 5, 3))},
        r"got mask \(1, 4, 5, 3\) for x \(4",
    ),
    "mask shape": ({"mask": np.ones(4)}, r"mask \(4,\) .* mask.reshape\(\(4, 1, 1\)\)"),
    "groups": (
        {"axis_index_groups": [[0]]},
        r"needs an axis_name; got groups \(\(0,\),\)",
    ),
    "scalar": ({"x": jnp.float32(1)}, r"at least one axis.*got shape \(\)"),
}
TYPE_ERRORS = {
    "momentum": ({"momentum": "high"}, r"momentum must be a Python number.*got 'high'"),
    "epsilon": ({"epsilon": None}, r"epsilon must be a Python number.*got None"),
    "int x": ({"x": jnp.ones((2, 3), jnp.int32)}, r"floating or complex; got int32"),
    "float8 x": (
        {"x": jnp.ones((2, 3), jnp.float8_e4m3fn)},
        r"x must have 16 bits or more; got float8_e4m3fn. Cast",
    ),
    "float8 mean": (
        {"state": jaxbn.init(3)[1]._replace(mean=jnp.zeros(3, jnp.float8_e5m2))},
        r"state.mean must have 16 bits or more; got float8_e5m2",
    ),
    "float4 dtype": (
        {"dtype": jnp.float4_e2m1fn},
        r"dtype must have 16 bits or more; got float4_e2m1fn",
    ),
    "unbiased": ({"unbiased": "no"}, r"unbiased must be a Python bool.*got 'no'"),
    "bool x": ({"x": np.ones((2, 3), bool)}, r"got bool .*x.astype\(jnp.float32\)"),
    "int scale": (variables(scale=jnp.ones(3, int)), r"params.scale must be floating"),
    "complex bias": (
        variables(bias=jnp.ones(3, jnp.complex64)),
        r"got complex64 for x",
    ),
    "train": ({"train": 1}, r"train must be a Python bool.*got 1"),
    "train array": ({"train": jnp.array(True)}, r"must be a Python bool"),
    "complex mask": ({"mask": np.ones(3, np.complex64)}, r"mask must .* got complex64"),
    "int dtype": ({"dtype": jnp.int32}, r"dtype must be floating .* got int32"),
    "real dtype": (
        {"x": X.astype(jnp.complex64), "dtype": "float32"},
        r"must be complex .* got float32",
    ),
}


@pytest.mark.parametrize(("kwargs", "match"), VALUE_ERRORS.values(), ids=VALUE_ERRORS)
@pytest.mark.parametrize("train", [True, False])
def test_batch_norm_rejects_wrong_values(kwargs, match, train):
    with pytest.raises(ValueError, match=match):
        call(**{"train": train, **kwargs})


@pytest.mark.parametrize(("kwargs", "match"), TYPE_ERRORS.values(), ids=TYPE_ERRORS)
def test_batch_norm_rejects_wrong_types(kwargs, match):
    with pytest.raises(TypeError, match=match):
        call(**kwargs)


def test_traced_train_error_names_static_argnames():
    with pytest.raises(TypeError, match="static_argnames='train'"):
        jax.jit(lambda train: call(train=train))(True)
    assert jax.jit(lambda x, train: call(x, train), static_argnums=1)(X, True)


@pytest.mark.parametrize("name", ["momentum", "epsilon"])
@pytest.mark.parametrize("value", [np.full(3, 0.9), 0.9j], ids=["vector", "complex"])
def test_traced_options_must_be_real_scalars(name, value):
    with pytest.raises(TypeError, match=rf"{name} must be .* traced real scalar"):
        jax.jit(lambda value: call(**{name: value}))(value)


@pytest.mark.parametrize(
    "transform", [lambda f, x: jax.jvp(f, (x,), (x,)), lambda f, x: jax.jacfwd(f)(x)]
)
def test_refused_forward_mode_names_the_other_rule(transform):
    with pytest.raises(TypeError, match="forward-mode") as info:
        transform(lambda x: call(x)[0], X)
    assert any('autodiff="jax"' in note for note in info.value.__notes__)


@pytest.mark.parametrize(
    "groups", [[[0, 1]], [[0, 1], [1, 2]], [[0, 1, 2, 3], []], [[0, 1, 2, 9]]], ids=str
)
def test_axis_index_groups_must_partition_the_axis(groups):
    options = {"axis_name": "data", "axis_index_groups": groups}
    with pytest.raises(ValueError, match=r"each index of the axis once, here 0 to 3"):
        jax.vmap(lambda x: call(x, **options), axis_name="data")(X)


@pytest.mark.parametrize("axis", [1.5, None, "last", (0, None)])
def test_axis_must_be_integers(axis):
    with pytest.raises(TypeError, match="an int or a sequence of ints; got"):
        axes.check_axis(axis, 3)


def test_axis_index_groups_must_be_lists_of_lists():
    with pytest.raises(ValueError, match=r"lists of axis indices .* got \(0, 1\)"):
        sync.check_partition((0, 1), 2)  # pyright: ignore[reportArgumentType]


def test_errors_are_raised_while_tracing():
    with pytest.raises(ValueError, match="feature axes"):
        jax.eval_shape(lambda x: call(x, axis=1), X)
    with pytest.raises(TypeError, match="floating or complex"):
        jax.eval_shape(call, jax.ShapeDtypeStruct((4, 3), jnp.int8))
    with pytest.raises(ValueError, match="at least one axis"):
        jax.vmap(call)(jnp.ones(4))


@pytest.mark.parametrize("num_features", [0, -3, (), (3, 0)], ids=str)
def test_init_rejects_feature_counts_below_1(num_features):
    with pytest.raises(ValueError, match=r"at least 1; got .*x.shape\[axis\]"):
        jaxbn.init(num_features)


def test_init_rejects_non_integer_feature_counts():
    with pytest.raises(TypeError, match=r"an int, or a tuple of ints.*got \(2, 2.5\)"):
        jaxbn.init((2, 2.5))  # pyright: ignore[reportCallIssue, reportArgumentType]


def test_init_rejects_integer_param_dtype():
    with pytest.raises(TypeError, match=r"param_dtype must be .* got int32"):
        jaxbn.init(3, param_dtype=jnp.int32)
    with pytest.raises(
        TypeError, match=r"param_dtype must have 16 bits.*float8_e4m3fn"
    ):
        jaxbn.init(3, param_dtype=jnp.float8_e4m3fn)


@pytest.mark.parametrize(
    "options", [{"momentum": 0}, {"momentum": 1}, {"momentum": None}, {"epsilon": 0}]
)
def test_momentum_and_epsilon_bounds_are_allowed(options):
    x = jnp.arange(24.0).reshape(8, 3)
    y, _ = call(x, **options)
    assert np.all(np.isfinite(y))


KINDS = {
    "dict": (lambda p, s, x: (p, s._asdict(), x), r"state must be .* got dict.*\*\*"),
    "tuple": (lambda p, s, x: (tuple(p), s, x), r"params must be .* got tuple"),
    "None": (lambda p, s, x: (p, None, x), r"state must be .* got NoneType"),
    "x first": (
        lambda p, s, x: (x, p, s),
        r"ArrayImpl of shape \(4, 5, 3\).*The order",
    ),
    "swapped": (lambda p, s, x: (s, p, x), r"params must be .* got BatchNormState"),
}


@pytest.mark.parametrize(("arrange", "match"), KINDS.values(), ids=KINDS)
def test_variables_of_other_kinds_are_rejected(arrange, match):
    with pytest.raises(TypeError, match=match):
        jaxbn.batch_norm(*arrange(*jaxbn.init(3), X), train=True)


def test_traced_unbiased_is_rejected_with_a_remedy():
    with pytest.raises(TypeError, match=r"unbiased must be .*functools.partial"):
        jax.jit(lambda unbiased: call(unbiased=unbiased))(True)


def test_traced_axis_is_rejected_with_a_remedy():
    with pytest.raises(TypeError, match=r"axis must be .*functools.partial"):
        jax.jit(lambda axis: call(axis=axis))(1)


def test_wrong_features_name_the_axis_that_has_them():
    with pytest.raises(ValueError, match=r"x has 5 along axis 1: pass axis=1\."):
        call(features=5)


@pytest.mark.parametrize(
    ("mask", "shape"), [((4, 5), "4, 5, 1"), ((4,), "4, 1, 1"), ((7,), "4, 1, 1")]
)
def test_mask_error_suggests_a_shape_that_broadcasts(mask, shape):
    with pytest.raises(ValueError, match=rf"mask.reshape\(\({shape}\)\)"):
        call(mask=np.ones(mask))


def test_unbound_axis_name_gets_a_note():
    with pytest.raises(NameError, match="data") as info:
        call(axis_name="data")
    # JAX may add notes of its own.
    assert any("leave it out" in note for note in info.value.__notes__)


SINGLE = r"more than one element of each feature, .*; got x .*axis_name=.*train=False"
SINGLE_CALLS: dict[str, Any] = {
    "one axis": lambda x, bn: bn(x[0]),
    "batch of one": lambda x, bn: bn(x[:1]),
    "features first": lambda x, bn: bn(x[:1].T, axis=0),
    "no reduced axis": lambda x, bn: bn(x[None, 0], axis=(0, 1), shape=(1, 3)),
    "vmap": lambda x, bn: jax.vmap(bn)(x),
    "jit": lambda x, bn: jax.jit(bn)(x[:1]),
    "virtual batches": lambda x, bn: bn(x, virtual_batch_size=1),
}
SEVERAL_CALLS: dict[str, Any] = {
    "rows": lambda x, bn: bn(x[:2]),
    "positions": lambda x, bn: bn(x[None]),
    "no row": lambda x, bn: bn(x[:0]),
    "inference": lambda x, bn: bn(x[:1], train=False),
    "mapped": lambda x, bn: jax.vmap(
        lambda x: bn(x, axis_name="rows"), axis_name="rows"
    )(x),
    "virtual batches": lambda x, bn: bn(x, virtual_batch_size=2),
    "virtual images": lambda x, bn: bn(x.reshape(2, 2, 3), virtual_batch_size=1),
    "renorm": lambda x, bn: bn(x[:1], function=jaxbn.batch_renorm),
    "statistics": lambda x, bn: jaxbn.batch_statistics(x[:1]),
    "any batch": lambda x, bn: jax.export.export(jax.jit(bn))(
        jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, 3"), x.dtype)
    ),
}


def train_on(x, shape=(3,), train=True, function=jaxbn.batch_norm, **options):
    return function(*jaxbn.init(shape), x, train, **options)[0]


@pytest.mark.parametrize("name", SINGLE_CALLS)
def test_single_elements_warn(name):
    x = jnp.arange(12.0).reshape(4, 3)
    with pytest.warns(UserWarning, match=SINGLE) as record:
        y = SINGLE_CALLS[name](x, train_on)
    np.testing.assert_array_equal(y, np.zeros(y.shape))
    assert len(record) == 1


@pytest.mark.parametrize("name", SEVERAL_CALLS)
def test_several_elements_do_not_warn(name, caplog):
    """Warnings are errors in these tests: then it would be logged."""
    SEVERAL_CALLS[name](jnp.arange(12.0).reshape(4, 3), train_on)
    assert not caplog.records


@pytest.mark.filterwarnings("error")
def test_single_elements_stop_no_program(caplog):
    y = train_on(jnp.ones((1, 3)))
    np.testing.assert_array_equal(y, np.zeros((1, 3)))
    assert [record.name for record in caplog.records] == ["jaxbn"]
    assert "more than one element of each feature" in caplog.text


def test_batch_axis_is_not_proposed_for_features():
    """A batch of 4 examples, and a layer of 4 features for 3."""
    for shape, axis in (((4, 3), -1), ((4, 5, 3), -1), ((4, 5, 4), 1)):
        with pytest.raises(ValueError, match="must have the shape") as info:
            train_on(jnp.ones(shape), 4, axis=axis)
        assert ("pass axis=2." in str(info.value)) == (shape[-1] == 4)
        assert "axis=0" not in str(info.value)
