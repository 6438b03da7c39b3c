"""The nine steps of docs/derivation.md, each by itself, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from jaxbn._moments import moments
from jaxbn._normalize import normalize

EPSILON = 0.1
M, C = 11, 4


class Symbols:
    """Those of docs/derivation.md, in float64 NumPy."""

    def __init__(self, rng):
        self.x = 3 + 2 * rng.normal(size=(M, C))
        self.gamma, self.beta = rng.normal(size=(2, 1, C))
        self.dl_dy = rng.normal(size=(M, C))
        self.mu = self.x.mean(0, keepdims=True)
        self.sigma2 = self.x.var(0, keepdims=True)
        self.x_hat = (self.x - self.mu) / np.sqrt(self.sigma2 + EPSILON)
        self.dl_dx_hat = self.dl_dy * self.gamma


@pytest.fixture
def symbols(rng, x64):
    return Symbols(rng)


@pytest.fixture
def normalize_vjp(symbols):
    """Cotangents of x (held apart from the statistics), μ, σ², scale and bias."""

    def f(x, mean, var, scale, bias):
        return normalize(
            *(x, x, mean, var, scale, bias),
            epsilon=EPSILON,
            axes=(0,),
            dtype=x.dtype,
            closed_form=True,
        )

    args = (symbols.x, symbols.mu, symbols.sigma2, symbols.gamma, symbols.beta)
    y, vjp = jax.vjp(f, *map(jnp.asarray, args))
    close(y, symbols.gamma * symbols.x_hat + symbols.beta)
    names = ("x", "mu", "sigma2", "gamma", "beta")
    return dict(zip(names, vjp(jnp.asarray(symbols.dl_dy)), strict=True))


def moments_of(x, weights=None):
    """(μ, σ²) by the closed form."""
    m = moments(x, x, weights, (0,), closed_form=True)
    return m.mean, m.var


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-12)


def test_steps_1_and_7_x_hat_to_x(symbols, normalize_vjp):
    dx_hat_dx = (symbols.sigma2 + EPSILON) ** -0.5
    close(normalize_vjp["x"], symbols.dl_dx_hat * dx_hat_dx)


def test_step_2_scale(symbols, normalize_vjp):
    close(normalize_vjp["gamma"], (symbols.dl_dy * symbols.x_hat).sum(0, keepdims=True))


def test_step_3_bias(symbols, normalize_vjp):
    close(normalize_vjp["beta"], symbols.dl_dy.sum(0, keepdims=True))


def test_step_4_variance(symbols, normalize_vjp):
    terms = symbols.dl_dx_hat * -0.5 * (symbols.x - symbols.mu)
    expected = (terms * (symbols.sigma2 + EPSILON) ** -1.5).sum(0, keepdims=True)
    close(normalize_vjp["sigma2"], expected)


def test_step_5_variance_to_mean_is_zero(symbols):
    """∂σ²/∂μ = -2/m Σ(x-μ) vanishes, so the closed form of step 9 has no such term."""
    dsigma2_dmu = -2 / M * (symbols.x - symbols.mu).sum(0)
    np.testing.assert_allclose(dsigma2_dmu, 0, atol=1e-14)
    with_step_5 = 2 / M * (symbols.x - symbols.mu) + dsigma2_dmu * (1 / M)
    _, vjp = jax.vjp(moments_of, jnp.asarray(symbols.x))
    close(vjp((jnp.zeros((1, C)), jnp.ones((1, C))))[0], with_step_5)


def test_step_6_mean(symbols, normalize_vjp):
    dx_hat_dmu = -((symbols.sigma2 + EPSILON) ** -0.5)
    close(normalize_vjp["mu"], (symbols.dl_dx_hat * dx_hat_dmu).sum(0, keepdims=True))


def test_step_8_mean_to_x(symbols, rng):
    dl_dmu = rng.normal(size=(1, C))
    _, vjp = jax.vjp(moments_of, jnp.asarray(symbols.x))
    close(
        vjp((jnp.asarray(dl_dmu), jnp.zeros((1, C))))[0], dl_dmu / M * np.ones((M, 1))
    )


def test_step_9_variance_to_x(symbols, rng):
    dl_dsigma2 = rng.normal(size=(1, C))
    _, vjp = jax.vjp(moments_of, jnp.asarray(symbols.x))
    actual = vjp((jnp.zeros((1, C)), jnp.asarray(dl_dsigma2)))[0]
    close(actual, dl_dsigma2 * 2 / M * (symbols.x - symbols.mu))


def test_steps_8_and_9_with_weights(symbols, rng):
    w = rng.uniform(size=(M, 1)) * (rng.random((M, 1)) < 0.7)
    n = w.sum()
    mu = (w * symbols.x).sum(0, keepdims=True) / n
    dl_dmu, dl_dsigma2 = rng.normal(size=(2, 1, C))
    _, vjp = jax.vjp(lambda x: moments_of(x, jnp.asarray(w)), jnp.asarray(symbols.x))
    actual = vjp((jnp.asarray(dl_dmu), jnp.asarray(dl_dsigma2)))[0]
    close(actual, w / n * dl_dmu + 2 * w / n * (symbols.x - mu) * dl_dsigma2)


def test_the_whole_chain(symbols, rng):
    """∂l/∂x as the text composes it, and the fused form that jaxbn amounts to."""

    def apply(x):
        params = jaxbn.BatchNormParams(
            *map(jnp.asarray, (symbols.gamma[0], symbols.beta[0]))
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
    dgamma, dbeta = (symbols.dl_dy * symbols.x_hat).sum(0), symbols.dl_dy.sum(0)
    fused = symbols.gamma * r * (symbols.dl_dy - dbeta / M - symbols.x_hat * dgamma / M)
    close(chain, fused)
