"""Test derivatives of each order and the transformations of JAX."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TOLERANCE, assert_close, rounded, run, saved_residuals
from jax.experimental.jet import jet
from jax.test_util import check_grads
from oracle import random_case, train_step

import jaxbn
from jaxbn._core import batch_norm as module

MASK = np.array([1, 1, 0, 1, 0.5, 2, 1, 0])[:, None]


def loss_of(case, **options) -> Any:
    """Return a scalar function, nonlinear in every result of batch_norm."""
    dy, dmean, dvar = map(jnp.asarray, (case.dy, case.dmean, case.dvar))

    def loss(scale, bias, mean, var, x):
        params, state = jaxbn.BatchNormParams(scale, bias), (mean, var, jnp.int32(3))
        state = jaxbn.BatchNormState(*state)
        y, new = jaxbn.batch_norm(params, state, x, True, momentum=0.7, **options)
        return jnp.sum(dy * jnp.sin(y)) + dmean @ new.mean**2 + dvar @ jnp.exp(new.var)

    arguments = (case.scale, case.bias, case.mean, case.var, case.x)
    return loss, tuple(map(jnp.asarray, arguments))


@pytest.fixture
def small(rng, x64):
    return random_case(rng, (8, 2))


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
@pytest.mark.parametrize("autodiff", ["custom_vjp", "jax"])
def test_gradients_match_finite_differences_to_second_order(mask, autodiff, small):
    loss, arguments = loss_of(small, mask=mask, autodiff=autodiff)
    modes = ("fwd", "rev") if autodiff == "jax" else ("rev",)
    check_grads(jax.jit(loss), arguments, order=2, modes=modes, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
def test_closed_form_matches_plain_autodiff_to_third_order(mask, small):
    closed, arguments = loss_of(small, mask=mask)
    plain, _ = loss_of(small, mask=mask, autodiff="jax")
    x = len(arguments) - 1
    hessian = jax.jit(jax.hessian(closed, x))(*arguments)
    reverse_twice = jax.jit(jax.jacrev(jax.grad(plain, x), x))(*arguments)
    np.testing.assert_allclose(hessian, reverse_twice, rtol=1e-9, atol=1e-9)
    forward = jax.jit(jax.jacfwd(jax.jacfwd(plain, x), x))(*arguments)
    np.testing.assert_allclose(hessian, forward, rtol=1e-9, atol=1e-9)

    def third(loss):
        return jax.grad(lambda x: jnp.sum(jnp.sin(jax.hessian(loss, 4)(*rest, x))))

    *rest, at = arguments
    one, other = (jax.jit(third(loss))(at) for loss in (closed, plain))
    np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-8)


def test_hessian_vector_product_is_jvp_of_grad(small, rng):
    loss, (*rest, x) = loss_of(small)
    v = jnp.asarray(rng.normal(size=x.shape))
    grad = lambda x: jax.grad(loss, 4)(*rest, x)  # noqa: E731
    hvp = jax.jit(lambda: jax.jvp(grad, (x,), (v,))[1])()
    hessian = jax.jit(jax.hessian(loss, 4))(*rest, x)
    np.testing.assert_allclose(hvp, jnp.tensordot(hessian, v, 2), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("autodiff", ["custom_vjp", "jax"])
def test_hessian_is_exact_at_a_constant_feature(autodiff, small):
    """The clip of m2 at 0 does not clip its curvature."""
    _, state = jaxbn.init(2, param_dtype=jnp.float64)
    params = jaxbn.BatchNormParams(None, None)

    def var(x):
        options = {"momentum": 0.0, "unbiased": False, "autodiff": autodiff}
        return jaxbn.batch_norm(params, state, x, True, **options)[1].var[0]

    hessian = jax.hessian(var)(jnp.full((5, 2), 0.3))[:, 0, :, 0]
    np.testing.assert_allclose(hessian, 2 / 5 * (np.eye(5) - 1 / 5), atol=1e-12)


def test_plain_autodiff_supports_jvp_and_linearize(small, rng):
    loss, arguments = loss_of(small, autodiff="jax")
    tangents = tuple(jnp.asarray(rng.normal(size=a.shape)) for a in arguments)
    _, tangent = jax.jvp(loss, arguments, tangents)
    gradients = jax.grad(loss_of(small)[0], range(5))(*arguments)
    expected = sum(jnp.vdot(g, t) for g, t in zip(gradients, tangents, strict=True))
    np.testing.assert_allclose(tangent, expected, rtol=1e-10)
    _, linear = jax.linearize(loss, *arguments)
    np.testing.assert_allclose(linear(*tangents), expected, rtol=1e-10)


def plain_forward(case, train):
    """Return batch_norm of the case as a function of x, by plain autodiff."""
    scale, bias, mean, var = map(jnp.asarray, case[1:5])
    params = jaxbn.BatchNormParams(scale, bias)
    state = jaxbn.BatchNormState(mean, var, jnp.float32(3))
    return lambda x: jaxbn.batch_norm(params, state, x, train, autodiff="jax")


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("n", [8, 65536])  # small and large for the CPU's sums
def test_plain_autodiff_is_plain_jax(n, train, rng):
    """It has primitives that every transformation knows, and no custom rule."""
    case = rounded(random_case(rng, (n, 4)), "float32")
    text = str(jax.make_jaxpr(plain_forward(case, train))(case.x))
    assert "reduce_sum" in text or not train
    for word in ("cond", "platform", "custom", "barrier"):
        assert word not in text


def assert_jet_matches_nested_jvp(forward, x, v):
    def derivative(x):
        return jax.jvp(forward, (x,), (v,))[1]

    _, (first, second) = jet(forward, (x,), ((v, jnp.zeros_like(v)),))
    expected, expected_second = jax.jvp(derivative, (x,), (v,))
    np.testing.assert_allclose(first, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(second, expected_second, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("n", [8, 131072])
def test_taylor_mode_matches_nested_jvp(n, train, rng):
    case = rounded(random_case(rng, (n, 2)), "float32")
    v = jnp.asarray(rng.normal(size=(n, 2)), jnp.float32)

    def forward(x):
        return plain_forward(case, train)(x)[0]

    assert_jet_matches_nested_jvp(forward, case.x, v)


@pytest.mark.parametrize("limits", [(1.0, 0.0), (1.2, 0.1), (9.0, 9.0)])
def test_taylor_mode_of_renorm_matches_nested_jvp(limits, rng):
    case = rounded(random_case(rng, (8, 2)), "float32")
    v = jnp.asarray(rng.normal(size=(8, 2)), jnp.float32)
    variables = jaxbn.init(2)

    def forward(x):
        options: dict[str, Any] = {"r_max": limits[0], "d_max": limits[1]}
        return jaxbn.batch_renorm(*variables, x, True, autodiff="jax", **options)[0]

    assert_jet_matches_nested_jvp(forward, case.x, v)


def test_plain_autodiff_supports_vmap_of_jvp(small, rng):
    loss, (*rest, x) = loss_of(small, autodiff="jax")
    vs = jnp.asarray(rng.normal(size=(3, *x.shape)))
    gradient = jax.grad(loss, 4)(*rest, x)
    f = lambda x: loss(*rest, x)  # noqa: E731
    tangents = jax.vmap(lambda v: jax.jvp(f, (x,), (v,))[1])(vs)
    expected = [jnp.vdot(gradient, v) for v in vs]
    np.testing.assert_allclose(tangents, expected, rtol=1e-9)


def test_closed_form_rejects_forward_mode(small):
    loss, arguments = loss_of(small)
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(loss, arguments, arguments)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.complex128])
def test_complex_input_has_one_real_variance(train, dtype, rng, x64):
    """σ² = E|x - μ|² adds the real and the imaginary part."""
    x = rng.normal(size=(20, 3)) + 1j * rng.normal(size=(20, 3)) + (2 - 1j)
    scale, bias = rng.normal(size=(2, 3)) + 1j * rng.normal(size=(2, 3))
    params = jaxbn.BatchNormParams(jnp.asarray(scale, dtype), jnp.asarray(bias, dtype))
    _, state = jaxbn.init(3, param_dtype=dtype)
    assert (state.mean.dtype, state.var.dtype) == (dtype, jnp.finfo(dtype).dtype)
    x_jax = jnp.asarray(x, dtype)
    y, new = jaxbn.batch_norm(params, state, x_jax, train, momentum=0.9)
    mu, sigma2 = (x.mean(0), x.var(0)) if train else (0, 1)
    tolerance = 1e-5 if dtype == jnp.complex64 else 1e-12
    expected = (x - mu) / np.sqrt(sigma2 + 1e-5) * scale + bias
    np.testing.assert_allclose(y, expected, rtol=tolerance, atol=tolerance)
    assert [a.dtype for a in new] == [a.dtype for a in state]
    if train:
        np.testing.assert_allclose(new.mean, 0.1 * x.mean(0), rtol=tolerance)
        var = 0.9 + 0.1 * x.var(0, ddof=1)
        np.testing.assert_allclose(new.var, var, rtol=tolerance)
    if train and dtype == jnp.complex128:
        check_grads(
            lambda x: jnp.sum(
                jnp.abs(jaxbn.batch_norm(params, state, x, True)[0]) ** 3
            ),
            (x_jax,),
            order=1,
            modes=("rev",),
        )


def test_complex_input_makes_a_real_mean_complex(rng):
    params, state = jaxbn.init(3)
    x = jnp.asarray(rng.normal(size=(5, 3)) + 1j, jnp.complex64)
    _, new = jaxbn.batch_norm(params, state, x, True, momentum=0.0)
    assert new.mean.dtype == jnp.complex64
    np.testing.assert_allclose(new.mean, np.asarray(x).mean(0), rtol=1e-5)


@pytest.mark.parametrize("autodiff", ["custom_vjp", "jax"])
def test_mask_has_zero_gradient(autodiff, small):
    def loss(mask, x):
        loss, arguments = loss_of(small, mask=mask, autodiff=autodiff)
        return loss(*arguments[:4], x)

    mask, x = jnp.asarray(MASK), jnp.asarray(small.x)
    assert not np.any(jax.grad(loss)(mask, x))
    second = jax.grad(lambda m: jnp.sum(jax.grad(loss, 1)(m, x) ** 2))
    assert not np.any(second(mask))


# Transformations


def test_vmap_matches_single_calls(rng):
    cases = [rounded(random_case(rng, (6, 4, 3)), "float32") for _ in range(3)]
    stacked = jax.tree.map(
        lambda *a: np.stack(a), *[c._replace(batches=0) for c in cases]
    )
    masks = jnp.asarray(rng.random((3, 6, 1, 1)) < 0.7)

    def grads(scale, bias, mean, var, x, dy, mask):
        params = jaxbn.BatchNormParams(scale, bias)
        state = jaxbn.BatchNormState(mean, var, jnp.int32(0))
        apply = lambda p, x: jaxbn.batch_norm(p, state, x, True, mask=mask)  # noqa: E731
        y, vjp, new = jax.vjp(apply, params, x, has_aux=True)
        return y, new.mean, new.var, *vjp(dy)

    fields = ("scale", "bias", "mean", "var", "x", "dy")
    arguments = [jnp.asarray(getattr(stacked, f)) for f in fields]
    y, mean, var, dparams, dx = jax.jit(jax.vmap(grads))(*arguments, masks)
    for i, case in enumerate(cases):
        case = case._replace(dmean=0 * case.dmean, dvar=0 * case.dvar, batches=0)
        expected = train_step(case, mask=masks[i])
        got = (y[i], mean[i], var[i], dx[i], dparams.scale[i], dparams.bias[i])
        for name, a in zip(expected._fields, got, strict=False):
            want = getattr(expected, name)
            np.testing.assert_allclose(a, want, rtol=0, atol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    "wrap",
    [
        jax.checkpoint,
        lambda f: jax.checkpoint(f, policy=jax.checkpoint_policies.dots_saveable),
        lambda f: lambda *a: jax.lax.cond(a[0][0] > -9, f, f, *a),
        lambda f: lambda *a: jax.lax.map(lambda a: f(*a), [v[None] for v in a])[0],
    ],
    ids=["remat", "remat with a policy", "cond", "map"],
)
def test_gradients_pass_through_control_flow_and_remat(wrap, small):
    loss, arguments = loss_of(small)
    expected = jax.grad(loss, range(5))(*arguments)
    actual = jax.grad(wrap(loss), range(5))(*arguments)
    chex.assert_trees_all_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_remat_updates_the_running_statistics_once(rng):
    params, state = jaxbn.init(3)
    x = jnp.asarray(rng.normal(size=(7, 3)), jnp.float32)

    @jax.checkpoint
    def apply(x):
        return jaxbn.batch_norm(params, state, x, True)

    (_, new), _ = jax.vjp(apply, x)
    assert new.count == 1
    np.testing.assert_allclose(new.mean, 0.01 * np.asarray(x).mean(0), rtol=1e-5)


def test_scan_over_layers_has_the_gradients_of_a_loop(small):
    _, state = jaxbn.init(2, param_dtype=jnp.float64)
    layers = jnp.stack([jnp.asarray(small.scale), jnp.asarray(small.bias)] * 2)
    layers = layers.reshape(2, 2, 2)

    def layer(x, scale_bias):
        params = jaxbn.BatchNormParams(*scale_bias)
        return jnp.tanh(jaxbn.batch_norm(params, state, x, True)[0]), None

    def scanned(x, layers):
        return jnp.sum(jax.lax.scan(layer, x, layers)[0] ** 2 * small.dy)

    def looped(x, layers):
        for each in layers:
            x, _ = layer(x, each)
        return jnp.sum(x**2 * small.dy)

    x = jnp.asarray(small.x)
    for a, b in zip(
        jax.grad(scanned, (0, 1))(x, layers),
        jax.grad(looped, (0, 1))(x, layers),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13)


def test_second_call_does_not_retrace(rng):
    params, state = jaxbn.init(3)
    x = jnp.asarray(rng.normal(size=(7, 3)), jnp.float32)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, state, x):
        return jaxbn.batch_norm(params, state, x, True, axis=[-1], mask=x[:, :1] < 9)

    for _ in range(3):
        y, state = step(params, state, x)
        x = y
    assert state.count == 3


@pytest.mark.parametrize("autodiff", ["custom_vjp", "jax"])
def test_traced_momentum_and_epsilon_match_oracle_in_one_program(autodiff, rng):
    case = rounded(random_case(rng, (8, 3)), "float32")
    traces = 0

    @jax.jit
    def step(momentum, epsilon):
        nonlocal traces
        traces += 1
        options = {"momentum": momentum, "epsilon": epsilon, "autodiff": autodiff}
        return run(case, jit=False, **options)

    for momentum, epsilon in [(0.9, 1e-5), (0.0, 0.1), (1.0, 3.0)]:
        options = {"momentum": momentum, "epsilon": epsilon}
        assert_close(
            step(**options), train_step(case, momentum=momentum, epsilon=epsilon), 2e-5
        )
    assert traces == 1


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("autodiff", ["custom_vjp", "jax"])
def test_gradients_of_momentum_and_epsilon_match_finite_differences(
    autodiff, train, small
):
    def loss(momentum, epsilon):
        scale, bias, mean, var = map(jnp.asarray, small[1:5])
        params = jaxbn.BatchNormParams(scale, bias)
        state = jaxbn.BatchNormState(mean, var, jnp.float32(3))
        options = {"momentum": momentum, "epsilon": epsilon, "autodiff": autodiff}
        y, new = jaxbn.batch_norm(params, state, small.x, train, **options)
        return jnp.sum(small.dy * jnp.sin(y)) + jnp.sum(new.mean) + jnp.sum(new.var)

    limits = {"rtol": 1e-6, "atol": 1e-6}
    check_grads(jax.jit(loss), (0.8, 0.3), order=2, modes=("rev",), **limits)


def test_eager_calls_of_a_schedule_share_one_compilation(rng):
    jitted: Any = module._train
    x = jnp.asarray(rng.normal(size=(6, 3)), jnp.float32)
    params, state = jaxbn.init(3)
    jitted.clear_cache()
    for momentum in (0.6, 0, jnp.float32(0.8), np.float64(0.9)):
        options = {"momentum": momentum, "epsilon": 0.2 * momentum}
        jaxbn.batch_norm(params, state, x, True, **options)
    assert jitted._cache_size() == 1


@pytest.mark.usefixtures("unchecked_types")
def test_eager_calls_share_one_compilation(rng):
    """Equal options of another type (list, NumPy scalar) reuse the program."""
    jitted: Any = module._train

    params, state = jaxbn.init(3)
    x = jnp.asarray(rng.normal(size=(7, 3)), jnp.float32)
    jitted.clear_cache()
    jaxbn.batch_norm(params, state, x, True)
    numpy_true: Any = np.bool_(True)
    jaxbn.batch_norm(params, state, np.asarray(x), numpy_true, axis=[1])
    jaxbn.batch_norm(params, state, x, True, momentum=np.float64(0.99), dtype="float32")
    assert jitted._cache_size() == 1


def test_numpy_arguments_return_jax_arrays(rng):
    case = rounded(random_case(rng, (5, 3)), "float32")
    numpy: Any = (case.scale, case.bias, case.mean, case.var, 3)
    params = jaxbn.BatchNormParams(*numpy[:2])
    state = jaxbn.BatchNormState(*numpy[2:])
    mask = np.arange(5)[:, None] < 4
    y, new = jaxbn.batch_norm(params, state, case.x, True, mask=mask)
    expected = train_step(case, mask=mask)
    np.testing.assert_allclose(y, expected.y, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(new.var, expected.var, rtol=1e-5)
    assert all(isinstance(a, jax.Array) for a in jax.tree.leaves((y, new)))


def test_batch_norm_works_without_jit(rng):
    case = rounded(random_case(rng, (6, 3)), "float32")
    with jax.disable_jit():
        actual = run(case, jit=False)
    assert_close(actual, train_step(case), TOLERANCE["float32"])


# Residuals of the backward pass


def large_residuals(function, params, x, size=8):
    """Return shape and dtype of each saved array of more than `size` entries."""
    saved = saved_residuals(function, params, x)
    return [(a.shape, a.dtype) for a in saved if a.size > size]


def train(params, state, x, mask=None):
    return jaxbn.batch_norm(params, state, x, True, mask=mask)[0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_residuals_are_x_once_and_vectors(dtype, wrap, rng):
    params, state = jaxbn.init(8)
    x = jnp.asarray(rng.normal(size=(16, 4, 8)), dtype)
    large = large_residuals(lambda p, x: wrap(train)(p, state, x), params, x)
    assert large == [(x.shape, x.dtype)]


def test_mask_residual_keeps_its_dtype(rng):
    params, state = jaxbn.init(8)
    x = jnp.asarray(rng.normal(size=(16, 4, 8)), jnp.bfloat16)
    mask = jnp.asarray(rng.random(x.shape) < 0.7)
    large = large_residuals(lambda p, x: train(p, state, x, mask), params, x)
    assert set(large) == {(x.shape, x.dtype), (x.shape, mask.dtype)}


def test_scan_residuals_are_x_once_per_layer(rng):
    params, state = jaxbn.init(8)
    x = jnp.asarray(rng.normal(size=(16, 4, 8)), jnp.bfloat16)

    def deep(params, x):
        def layer(x, _):
            return train(params, state, x), None

        return jax.lax.scan(layer, x, None, length=5)[0]

    large = large_residuals(deep, params, x, size=5 * 8)
    assert large == [((5, *x.shape), x.dtype)]


@pytest.mark.parametrize("train", [True, False])
def test_steps_and_rules_have_names_in_programs(train):
    """A profile shows the scopes, a jaxpr the rules."""
    arguments = (*jaxbn.init(3), jnp.ones((4, 3)))
    step = jax.jit(lambda p, s, x: jaxbn.batch_norm(p, s, x, train))
    text = step.lower(*arguments).as_text(debug_info=True)
    in_training = ["moments", "merge", "update_running_stats"]
    found = {name for name in [*in_training, "normalize"] if f"jaxbn.{name}" in text}
    # Without axis_name the merge has no operation.
    assert found == (
        {"moments", "update_running_stats", "normalize"} if train else {"normalize"}
    )
    jaxpr = str(jax.make_jaxpr(step)(*arguments))
    assert ("_moments_vjp" in jaxpr, "_normalize_vjp" in jaxpr) == (train, True)


def test_merge_has_a_name_in_programs():
    mapped = jax.vmap(
        lambda x: jaxbn.batch_norm(*jaxbn.init(3), x, True, axis_name="data"),
        axis_name="data",
    )
    text = jax.jit(mapped).lower(jnp.ones((2, 4, 3))).as_text(debug_info=True)
    assert "jaxbn.merge" in text
