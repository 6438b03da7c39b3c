"""Test each of the nine steps and the remarks of docs/mathematics.md in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from jaxbn._core.moments import moments
from jaxbn._core.normalize import normalize_expanded

EPSILON = 0.1
M, C = 11, 4


class Symbols:
    """Hold the symbols of docs/mathematics.md in float64 NumPy."""

    def __init__(self, rng):
        self.x = 3 + 2 * rng.normal(size=(M, C))
        self.scale, self.bias = rng.normal(size=(2, 1, C))
        self.dl_dy = rng.normal(size=(M, C))
        self.mu = self.x.mean(0, keepdims=True)
        self.sigma2 = self.x.var(0, keepdims=True)
        self.x_hat = (self.x - self.mu) / np.sqrt(self.sigma2 + EPSILON)
        self.dl_dx_hat = self.dl_dy * self.scale


@pytest.fixture
def symbols(rng, x64):
    return Symbols(rng)


@pytest.fixture
def normalize_vjp(symbols):
    """Return the cotangents of x (at fixed statistics), μ, σ², scale and bias."""

    def f(x, mean, var, scale, bias):
        return normalize_expanded(
            jaxbn.BatchNormParams(scale[0], bias[0]),
            *(mean, var, x, x, EPSILON),
            axis=(1,),
            dtype=x.dtype,
            closed_form=True,
        )

    args = (symbols.x, symbols.mu, symbols.sigma2, symbols.scale, symbols.bias)
    y, vjp = jax.vjp(f, *map(jnp.asarray, args))
    close(y, symbols.scale * symbols.x_hat + symbols.bias)
    names = ("x", "mu", "sigma2", "scale", "bias")
    return dict(zip(names, vjp(jnp.asarray(symbols.dl_dy)), strict=True))


def moments_of(x, weights=None):
    """Return μ and σ², differentiated by the closed form."""
    m = moments(x, x, weights, (0,), closed_form=True)
    return m.mean, m.var


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-12)


def test_normalize_vjp_of_x_is_steps_1_and_7(symbols, normalize_vjp):
    dx_hat_dx = (symbols.sigma2 + EPSILON) ** -0.5
    close(normalize_vjp["x"], symbols.dl_dx_hat * dx_hat_dx)


def test_normalize_vjp_of_scale_is_step_2(symbols, normalize_vjp):
    close(normalize_vjp["scale"], (symbols.dl_dy * symbols.x_hat).sum(0, keepdims=True))


def test_normalize_vjp_of_bias_is_step_3(symbols, normalize_vjp):
    close(normalize_vjp["bias"], symbols.dl_dy.sum(0, keepdims=True))


def test_normalize_vjp_of_variance_is_step_4(symbols, normalize_vjp):
    terms = symbols.dl_dx_hat * -0.5 * (symbols.x - symbols.mu)
    expected = (terms * (symbols.sigma2 + EPSILON) ** -1.5).sum(0, keepdims=True)
    close(normalize_vjp["sigma2"], expected)


def test_moments_vjp_omits_step_5_which_is_zero(symbols):
    """∂σ²/∂μ = -2/m Σ(x-μ) vanishes, so the closed form of step 9 has no such term."""
    dsigma2_dmu = -2 / M * (symbols.x - symbols.mu).sum(0)
    np.testing.assert_allclose(dsigma2_dmu, 0, atol=1e-14)
    with_step_5 = 2 / M * (symbols.x - symbols.mu) + dsigma2_dmu * (1 / M)
    _, vjp = jax.vjp(moments_of, jnp.asarray(symbols.x))
    close(vjp((jnp.zeros((1, C)), jnp.ones((1, C))))[0], with_step_5)


def test_normalize_vjp_of_mean_is_step_6(symbols, normalize_vjp):
    dx_hat_dmu = -((symbols.sigma2 + EPSILON) ** -0.5)
    close(normalize_vjp["mu"], (symbols.dl_dx_hat * dx_hat_dmu).sum(0, keepdims=True))


def test_moments_vjp_of_mean_is_step_8(symbols, rng):
    dl_dmu = rng.normal(size=(1, C))
    _, vjp = jax.vjp(moments_of, jnp.asarray(symbols.x))
    close(
        vjp((jnp.asarray(dl_dmu), jnp.zeros((1, C))))[0], dl_dmu / M * np.ones((M, 1))
    )


def test_moments_vjp_of_variance_is_step_9(symbols, rng):
    dl_dsigma2 = rng.normal(size=(1, C))
    _, vjp = jax.vjp(moments_of, jnp.asarray(symbols.x))
    actual = vjp((jnp.zeros((1, C)), jnp.asarray(dl_dsigma2)))[0]
    close(actual, dl_dsigma2 * 2 / M * (symbols.x - symbols.mu))


def test_weighted_moments_vjp_is_steps_8_and_9(symbols, rng):
    w = rng.uniform(size=(M, 1)) * (rng.random((M, 1)) < 0.7)
    n = w.sum()
    mu = (w * symbols.x).sum(0, keepdims=True) / n
    dl_dmu, dl_dsigma2 = rng.normal(size=(2, 1, C))
    _, vjp = jax.vjp(lambda x: moments_of(x, jnp.asarray(w)), jnp.asarray(symbols.x))
    actual = vjp((jnp.asarray(dl_dmu), jnp.asarray(dl_dsigma2)))[0]
    close(actual, w / n * dl_dmu + 2 * w / n * (symbols.x - mu) * dl_dsigma2)


def test_batch_norm_gradient_equals_chain_and_fused_form(symbols, rng):
    """∂l/∂x by the chain rule of the text equals the fused form of jaxbn."""

    def apply(x):
        params = jaxbn.BatchNormParams(
            *map(jnp.asarray, (symbols.scale[0], symbols.bias[0]))
        )
        _, state = jaxbn.init(C, param_dtype=jnp.float64)
        return jaxbn.batch_norm(params, state, x, True, epsilon=EPSILON)[0]

    _, vjp = jax.vjp(apply, jnp.asarray(symbols.x))
    r = (symbols.sigma2 + EPSILON) ** -0.5
    dl_dsigma2 = (symbols.dl_dx_hat * -0.5 * (symbols.x - symbols.mu) * r**3).sum(0)
    dl_dmu = dl_dsigma2 * -2 / M * (symbols.x - symbols.mu).sum(0)
    dl_dmu = dl_dmu + (symbols.dl_dx_hat * -r).sum(0)
    chain = (
        symbols.dl_dx_hat * r
        + dl_dmu / M
        + dl_dsigma2 * 2 / M * (symbols.x - symbols.mu)
    )
    close(vjp(jnp.asarray(symbols.dl_dy))[0], chain)
    close(chain, fused(symbols, 1.0))


def test_gradient_sums_to_zero_and_nearly_vanishes_along_x_hat(symbols):
    """The factor ε / (σ² + ε) remains of the component along x̂."""
    dx = fused(symbols, 1.0)
    dscale = (symbols.dl_dy * symbols.x_hat).sum(0, keepdims=True)
    var = symbols.sigma2 + EPSILON
    np.testing.assert_allclose(dx.sum(0), 0, atol=1e-13)
    close(
        (symbols.x_hat * dx).sum(0, keepdims=True),
        symbols.scale * var**-0.5 * EPSILON / var * dscale,
    )


def test_normalize_and_moments_vjps_add_up_to_fused_form(symbols, normalize_vjp):
    """The text gives ∂l/∂μ = -γr ∂l/∂β and ∂l/∂σ² = -½ γr² ∂l/∂γ."""
    r = (symbols.sigma2 + EPSILON) ** -0.5
    close(normalize_vjp["mu"], -symbols.scale * r * normalize_vjp["bias"])
    close(
        normalize_vjp["sigma2"],
        -0.5 * symbols.scale * r**2 * normalize_vjp["scale"],
    )
    _, vjp = jax.vjp(moments_of, jnp.asarray(symbols.x))
    (through_moments,) = vjp((normalize_vjp["mu"], normalize_vjp["sigma2"]))
    close(normalize_vjp["x"] + through_moments, fused(symbols, 1.0))


def test_weighted_gradient_equals_fused_form(symbols, rng):
    w = rng.uniform(size=(M, 1)) * (rng.random((M, 1)) < 0.7)
    symbols.mu = (w * symbols.x).sum(0, keepdims=True) / w.sum()
    deviation = symbols.x - symbols.mu
    symbols.sigma2 = (w * deviation**2).sum(0, keepdims=True) / w.sum()
    symbols.x_hat = deviation / np.sqrt(symbols.sigma2 + EPSILON)
    params = jaxbn.BatchNormParams(
        *map(jnp.asarray, (symbols.scale[0], symbols.bias[0]))
    )
    _, state = jaxbn.init(C, param_dtype=jnp.float64)

    def apply(x):
        return jaxbn.batch_norm(params, state, x, True, epsilon=EPSILON, mask=w)[0]

    _, vjp = jax.vjp(apply, jnp.asarray(symbols.x))
    close(vjp(jnp.asarray(symbols.dl_dy))[0], fused(symbols, w))


def fused(symbols, w):
    """Return ∂l/∂x by the fused form for elements of weight `w`."""
    r = (symbols.sigma2 + EPSILON) ** -0.5
    dscale = (symbols.dl_dy * symbols.x_hat).sum(0, keepdims=True)
    dbias = symbols.dl_dy.sum(0, keepdims=True)
    share = w / (w.sum() if isinstance(w, np.ndarray) else M)
    inner = symbols.dl_dy - share * dbias - share * symbols.x_hat * dscale
    return symbols.scale * r * inner


def test_division_by_inv_std_multiplies_y_by_variance(rng):
    """Division by (σ² + ε)^(-1/2) makes y 100 times too large at σ = 10."""
    x = rng.normal(3, 10, size=(8, 1)).astype(np.float32)
    params, state = jaxbn.init(1)
    state = state._replace(mean=state.mean + 3, var=100 * state.var)
    y, _ = jaxbn.batch_norm(params, state, x, train=False)
    divided = (x - 3) / (100 + 1e-5) ** -0.5
    np.testing.assert_allclose(divided, 100 * y, rtol=1e-5)


def test_moments_are_accurate_where_difference_of_squares_cancels(rng):
    """At |μ| = 10⁴σ the squares are rounded to multiples of 8σ² in float32."""
    assert np.spacing(np.float32(1e8)) == 8
    x = rng.normal(1e4, 1, size=(4096, 16)).astype(np.float32)
    difference = np.mean(x * x, 0) - np.mean(x, 0) ** 2
    assert np.abs(difference - 1).min() > 0.5
    assert difference.min() < 0
    mean, var = moments_of(jnp.asarray(x))
    np.testing.assert_allclose(var[0], np.var(x, 0, dtype=np.float64), rtol=1e-4)
    np.testing.assert_allclose(mean[0], np.mean(x, 0, dtype=np.float64), rtol=1e-6)


def test_cubed_inv_std_underflows_at_large_variance():
    """Step 4 therefore never forms the cube; σ is 10¹⁵ here."""
    assert np.float32(1e-15) ** 3 < np.finfo(np.float32).tiny


@pytest.mark.parametrize("shifts", [0.0, 1.0, 4.0, -7.5])
def test_shifted_sums_grow_by_1_plus_squared_shift(shifts, symbols):
    """Σd² / M₂ = 1 + (μ - s)²/σ², which is 17 at a distance of 4 deviations."""
    s = symbols.mu - shifts * np.sqrt(symbols.sigma2)
    d = symbols.x - s
    m2 = (d**2).sum(0) - d.sum(0) ** 2 / M
    close(m2, M * symbols.sigma2[0])
    close((d**2).sum(0) / m2, 1 + np.full(C, shifts) ** 2)


@pytest.mark.parametrize("k", [1, 4, 16])
def test_sample_mean_error_is_largest_for_outliers(k, rng):
    """A mean of k in m values is off by at most σ√(m/k - 1): a factor m/k above."""
    m = 64 * k
    outliers = np.zeros(m)
    outliers[:k] = 1
    for x in (outliers, rng.normal(size=m), rng.exponential(size=m)):
        factor = 1 + (x.mean() - np.sort(x)[-k:].mean()) ** 2 / x.var()
        assert factor <= 64 * (1 + 1e-12)
    close(1 + (outliers.mean() - 1) ** 2 / outliers.var(), 64)
