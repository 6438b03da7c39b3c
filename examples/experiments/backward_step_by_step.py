"""Check the nine steps of batch norm's backward pass against automatic differentiation.

60 real digits enter a layer of 100 features; ∂l/∂y is the gradient of the loss of a
classifier that follows it. Each formula is written as code, with jaxbn's names, and
compared with JAX's derivative of the same step alone, in float32 and float64.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _experiment import arguments, digits, report
from jax import Array
from matplotlib.figure import Figure

import jaxbn

EPSILON = 1e-5  # jaxbn's default
DTYPES = "float32", "float64"


def variance(x: Array, mean: Array) -> Array:
    """Compute σ² = (1/m) Σ (xᵢ - μ)²."""
    return ((x - mean) ** 2).mean(0)


def whiten(x: Array, mean: Array, var: Array) -> Array:
    """Compute x̂ᵢ = (xᵢ - μ) (σ² + ε)^(-1/2)."""
    return (x - mean) * (var + EPSILON) ** -0.5


def affine(x_hat: Array, scale: Array, bias: Array) -> Array:
    """Compute yᵢ = γ x̂ᵢ + β."""
    return scale * x_hat + bias


def forward(x: Array, scale: Array, bias: Array) -> Array:
    """Compute y by Algorithm 1 of Ioffe & Szegedy, arXiv:1502.03167: μ, σ², x̂, y."""
    return affine(whiten(x, x.mean(0), variance(x, x.mean(0))), scale, bias)


def layer(x: Array, scale: Array, bias: Array, train: bool = True) -> Array:
    """Compute y with jaxbn; at inference, the statistics of x are the running ones."""
    state = jaxbn.init(x.shape[1], param_dtype=x.dtype)[1]
    params = jaxbn.BatchNormParams(scale, bias)
    y, state = jaxbn.batch_norm(params, state, x, True, momentum=None)
    return y if train else jaxbn.batch_norm(params, state, x, False)[0]


def by_hand(x: Array, scale: Array, bias: Array, dy: Array) -> tuple[dict, dict]:
    """Return the value of each formula, and the three parts of ∂l/∂x."""
    m, mean, var = len(x), x.mean(0), variance(x, x.mean(0))
    inv_std, x_hat, v = (var + EPSILON) ** -0.5, whiten(x, mean, var), {}
    v["1. ∂l/∂x̂ᵢ = ∂l/∂yᵢ · γ"] = dx_hat = dy * scale
    v["2. ∂l/∂γ = Σ ∂l/∂yᵢ · x̂ᵢ"] = dscale = (dy * x_hat).sum(0)
    v["3. ∂l/∂β = Σ ∂l/∂yᵢ"] = dbias = dy.sum(0)
    terms = dx_hat * -0.5 * (x - mean) * (var + EPSILON) ** -1.5
    v["4. ∂l/∂σ² = Σ ∂l/∂x̂ᵢ · (-½) (xᵢ-μ) (σ²+ε)^(-3/2)"] = dvar = terms.sum(0)
    v["5. ∂σ²/∂μ = (-2/m) Σ (xᵢ-μ) = 0"] = dvar_dmean = -2 / m * (x - mean).sum(0)
    v["6. ∂x̂ᵢ/∂μ = -(σ²+ε)^(-1/2)"] = dx_hat_dmean = -inv_std
    v["7. ∂x̂ᵢ/∂xᵢ = (σ²+ε)^(-1/2)"] = dx_hat_dx = inv_std
    v["8. ∂μ/∂xᵢ = 1/m"] = dmean_dx = 1 / m
    v["9. ∂σ²/∂xᵢ = (2/m) (xᵢ-μ)"] = dvar_dx = 2 / m * (x - mean)
    dmean = dvar * dvar_dmean + (dx_hat * dx_hat_dmean).sum(0)
    v["∂l/∂μ = ∂l/∂σ² · ∂σ²/∂μ + Σ ∂l/∂x̂ᵢ · ∂x̂ᵢ/∂μ"] = dmean
    parts = {"x̂": dx_hat * dx_hat_dx, "σ²": dvar * dvar_dx}
    parts["μ"] = jnp.broadcast_to(dmean * dmean_dx, x.shape)
    v["∂l/∂xᵢ = the sum of the parts through x̂, μ and σ²"] = sum(parts.values())
    fused = scale * inv_std * (dy - dbias / m - x_hat * dscale / m)
    v["fused: γ (σ²+ε)^(-1/2) (∂l/∂yᵢ - ∂l/∂β/m - x̂ᵢ ∂l/∂γ/m)"] = fused
    # jaxbn's two derivatives combined: two numbers per feature, one pass over x and dy.
    offset, slope = -scale * inv_std * dbias / m, -scale * inv_std**2 * dscale / m
    one_pass = scale * inv_std * dy + slope * (x - mean) + offset
    v["in jaxbn: γ (σ²+ε)^(-1/2) ∂l/∂yᵢ + slope (xᵢ-μ) + offset"] = one_pass
    v["γ = √(σ²+ε) and β = μ restore x"] = forward(x, 1 / inv_std, mean)
    at_inference = affine(whiten(x, mean, m / (m - 1) * var), scale, bias)
    v["inference: γ (x-μ) (σ²+ε)^(-1/2) + β"] = at_inference
    return v, parts


def by_autodiff(x: Array, scale: Array, bias: Array, dy: Array) -> list[Array]:
    """Return the derivatives by JAX of each step alone, in the order of `by_hand`."""
    mean, var = x.mean(0), variance(x, x.mean(0))
    ones, x_hat = (jnp.ones_like(x), jnp.ones_like(mean)), whiten(x, mean, var)
    dx_hat, dscale, dbias = jax.vjp(affine, x_hat, scale, bias)[1](dy)
    _, dmean, dvar = jax.vjp(whiten, x, mean, var)[1](dx_hat)
    dvar_dx, dvar_dmean = jax.vjp(variance, x, mean)[1](ones[1])
    dx_hat_dmean = jax.jvp(lambda mean: whiten(x, mean, var), (mean,), ones[1:])[1]
    dx_hat_dx = jax.jvp(lambda x: whiten(x, mean, var), (x,), ones[:1])[1]
    (dmean_dx,) = jax.vjp(lambda x: x.mean(0), x)[1](ones[1])
    dx, of_layer = (jax.vjp(f, x, scale, bias)[1](dy)[0] for f in (forward, layer))
    steps = [dx_hat, dscale, dbias, dvar, dvar_dmean, dx_hat_dmean, dx_hat_dx, dmean_dx]
    return [*steps, dvar_dx, dmean, dx, dx, of_layer, x, layer(x, scale, bias, False)]


def example(dtype: str) -> tuple[Array, Array, Array, Array]:
    """Return x of 60 digits, random scale and bias, and ∂l/∂y of a classifier."""
    rng, (_, (images, labels)) = np.random.default_rng(0), digits()
    drawn = (rng.standard_normal((n, 100)) for n in (784, 10, 1, 1, 1))
    kernel, head, shift, scale, bias = (jnp.asarray(a, dtype) for a in drawn)
    x = images[:60].astype(dtype) @ kernel / 9 + shift
    cost = optax.softmax_cross_entropy_with_integer_labels
    grad = jax.grad(lambda y: cost(jax.nn.relu(y) @ head.T / 10, labels[:60]).sum())
    return x, 1 + scale[0] / 3, bias[0], grad(forward(x, 1 + scale[0] / 3, bias[0]))


def compare(dtype: str) -> tuple[dict[str, float], dict, Array]:
    """Return the largest relative difference per formula, the parts of ∂l/∂x, and x."""
    x, *rest = example(dtype)
    (values, parts), truth = by_hand(x, *rest), by_autodiff(x, *rest)
    terms, found = 2 * abs(x - x.mean(0)).mean(), {}
    for (formula, value), expected in zip(values.items(), truth, strict=True):
        size = terms if formula.endswith("= 0") else abs(expected).max()
        found[formula] = float(abs(value - expected).max() / size)
    return found, parts, x


def draw(parts: dict[str, Array], x: Array) -> Figure:
    """Plot the contribution of each path to ∂l/∂x, for two features."""
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    parts = {"all three, ∂l/∂x": jnp.stack([*parts.values()]).sum(0)} | parts
    for feature, axes in enumerate(figure.subplots(1, 2)):
        for (name, part), marker in zip(parts.items(), "xov^", strict=True):
            axes.plot(x[:, feature], part[:, feature], marker, label=f"through {name}")
        axes.set(xlabel="x", ylabel="part of ∂l/∂x", title=f"Feature {feature}")
    figure.legend(handles=figure.axes[0].lines, loc="outside lower center", ncols=4)
    return figure


def main() -> None:
    """Compare in both dtypes; write a table and a picture."""
    args = arguments(__doc__)
    single, *_ = compare(DTYPES[0])
    with jax.enable_x64(True):
        double, parts, x = compare(DTYPES[1])
        figure, factor = draw(parts, x), np.asarray(x.var(0, ddof=1) + EPSILON)
    table = [["Formula", *(f"Difference from autodiff, {t}" for t in DTYPES)]]
    for formula, *offs in zip(single, single.values(), double.values(), strict=True):
        table.append([formula, *(f"{off:.0e}" if off else "0" for off in offs)])
    worst = max(single.values()), max(double.values())
    off = f"{factor.min():.1f} to {factor.max():.1f}"
    hold = "all formulas agreed with automatic differentiation, to "
    hold += f"{worst[0]:.0e} in float32 and {worst[1]:.0e} in float64."
    divided = f"x - μ divided by (σ²+ε)^(-1/2) was {off} times the normalized x̂."
    findings = {hold: worst[0] < 1e-5 and worst[1] < 1e-13}
    findings[divided] = np.allclose(factor, 1)
    claim = "All nine steps are right, and inference divides x - μ by (σ²+ε)^(-1/2)."
    report(args, "backward_step_by_step", figure, table, (claim, findings))


if __name__ == "__main__":
    main()
