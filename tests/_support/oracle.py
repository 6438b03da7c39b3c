"""Batch normalization and its gradients in NumPy float64, by the chain rule.

It shares no code with jaxbn and takes the nine steps of docs/mathematics.md one by one,
including the step that is zero.
"""

from typing import Any, NamedTuple

import numpy as np


class Case(NamedTuple):
    """Hold the arguments of batch_norm and the cotangents of all its results."""

    x: np.ndarray
    scale: np.ndarray
    bias: np.ndarray
    mean: np.ndarray
    var: np.ndarray
    dy: np.ndarray
    dmean: np.ndarray
    dvar: np.ndarray
    batches: Any = 3


class Result(NamedTuple):
    """Hold the results of batch_norm and the gradient of each argument.

    `sizes` holds the largest terms of sums that may cancel to exactly zero. Rounding
    is measured against them.
    """

    y: np.ndarray
    mean: np.ndarray
    var: np.ndarray
    dx: np.ndarray
    dscale: np.ndarray
    dbias: np.ndarray
    dmean: np.ndarray
    dvar: np.ndarray
    sizes: Any = None


def random_case(rng, shape, axis=-1, loc=0.7, std=1.9) -> Case:
    """Draw a case; x has mean `loc` and standard deviation `std`."""
    axes = axis if isinstance(axis, tuple) else (axis,)
    features = tuple(shape[a] for a in axes)
    return Case(
        x=loc + std * rng.normal(size=shape),
        scale=rng.normal(size=features),
        bias=rng.normal(size=features),
        mean=rng.normal(size=features),
        var=rng.uniform(0.5, 2.0, size=features),
        dy=rng.normal(size=shape),
        dmean=rng.normal(size=features),
        dvar=rng.normal(size=features),
    )


def flatten_elements(x, axis):
    """Reshape x to (elements, *features), with features in the order of `axis`."""
    axes = axis if isinstance(axis, tuple) else (axis,)
    moved = np.moveaxis(x, axes, range(-len(axes), 0))
    return moved.reshape(-1, *moved.shape[x.ndim - len(axes) :])


def unflatten_elements(flat, shape, axis):
    """Invert `flatten_elements` for an array of shape `shape`."""
    axes = axis if isinstance(axis, tuple) else (axis,)
    order = [a for a in range(len(shape)) if a not in {b % len(shape) for b in axes}]
    moved = flat.reshape(*(shape[a] for a in order), *flat.shape[1:])
    return np.moveaxis(moved, range(-len(axes), 0), axes)


def effective_size(w):
    """Return (Σ w)² / Σ w² over the elements, and 0 where all weights are 0."""
    shares = w / np.where(w.sum(0) > 0, w.sum(0), 1)
    squares = (shares**2).sum(0)
    return np.where(squares > 0, 1 / np.where(squares > 0, squares, 1), 0)


def weighted_mean(x, w, total):
    """Return Σ w x / total; the mean of equal values is exactly their value."""
    mu = (w * x).sum(0) / total
    return mu + (w * (x - mu)).sum(0) / total


def train_step(
    case, *, axis=-1, momentum=0.99, epsilon=1e-5, unbiased=True, mask=None
) -> Result:
    """Compute a training step and its gradients."""
    case = Case(*(np.asarray(a, np.float64) for a in case))
    w = np.ones_like(case.x)
    if mask is not None:
        w = np.broadcast_to(np.asarray(mask, np.float64), case.x.shape)
    x, w, dy = (flatten_elements(a, axis) for a in (case.x, w, case.dy))
    weight = w.sum(0)
    n = effective_size(w) if np.asarray(mask).dtype.kind in "fV" else weight
    some, updates = n > 0, n > (1 if unbiased else 0)
    m = np.where(some, weight, 1)

    # Forward, Algorithm 1.
    mu = np.where(some, weighted_mean(x, w, m), case.mean)
    sigma2 = np.where(some, (w * (x - mu) ** 2).sum(0) / m, case.var)
    inv_std = 1 / np.sqrt(sigma2 + epsilon)
    x_hat = (x - mu) * inv_std
    y = case.scale * x_hat + case.bias
    keep = case.batches / (case.batches + 1) if momentum is None else momentum
    bessel = n / np.where(updates, n - 1, 1) if unbiased else np.ones_like(n)
    mean = np.where(updates, keep * case.mean + (1 - keep) * mu, case.mean)
    var = np.where(updates, keep * case.var + (1 - keep) * bessel * sigma2, case.var)

    # Backward, step by step.
    dx_hat = dy * case.scale  # 1
    dscale = (dy * x_hat).sum(0)  # 2
    dbias = dy.sum(0)  # 3
    dsigma2 = (dx_hat * -0.5 * (x - mu) * inv_std**3).sum(0)  # 4
    dsigma2_state = np.where(some, 0, dsigma2)
    dsigma2 = dsigma2 + np.where(updates, (1 - keep) * bessel * case.dvar, 0)
    dsigma2_dmu = -2 / m * (w * (x - mu)).sum(0)  # 5
    dx_hat_dmu = -inv_std  # 6
    dx_hat_dx = inv_std  # 7
    dmu_dx = np.where(some, w / m, 0)  # 8
    dsigma2_dx = np.where(some, 2 / m * w * (x - mu), 0)  # 9
    dmu_y = (dx_hat * dx_hat_dmu).sum(0)
    dmu = dsigma2 * np.where(some, dsigma2_dmu, 0) + dmu_y
    dmu = dmu + np.where(updates, (1 - keep) * case.dmean, 0)
    dx = dx_hat * dx_hat_dx + dmu * dmu_dx + dsigma2 * dsigma2_dx

    terms = (np.abs(x) + np.abs(mu)) * inv_std  # x_hat before its terms cancel
    eps = np.finfo(np.float32).eps
    return Result(
        y=unflatten_elements(y, case.x.shape, axis),
        mean=mean,
        var=var,
        dx=unflatten_elements(dx, case.x.shape, axis),
        dscale=dscale,
        dbias=dbias,
        dmean=np.where(updates, keep, 1) * case.dmean + np.where(some, 0, dmu_y),
        dvar=np.where(updates, keep, 1) * case.dvar + dsigma2_state,
        sizes={
            "dx": np.abs(dx_hat * dx_hat_dx).max(initial=0),
            "dscale": (np.abs(dy) * terms).sum(0).max(initial=0),
            "dbias": np.abs(dy).sum(0).max(initial=0),
            "y": (np.abs(case.scale) * terms).max(initial=0),
            "mean": np.abs([keep * case.mean, (1 - keep) * mu]).max(initial=0),
            # The mean of equal values is rounded, which leaves a variance of this size.
            "var": (1 - keep)
            * eps
            * (bessel * weight * (x**2).max(0, initial=0)).max(),
        },
    )


def batch_moments(case, axis=-1, mask=None):
    """Return mean and biased variance of each feature, the running ones if n = 0."""
    w = np.ones(case.x.shape) if mask is None else np.broadcast_to(mask, case.x.shape)
    x, w = (flatten_elements(np.asarray(a, np.float64), axis) for a in (case.x, w))
    some, total = w.sum(0) > 0, np.where(w.sum(0) > 0, w.sum(0), 1)
    mu = weighted_mean(x, w, total)
    var = (w * (x - mu) ** 2).sum(0) / total
    return np.where(some, mu, case.mean), np.where(some, var, case.var)


def renorm_step(case, *, r_max, d_max, axis=-1, epsilon=1e-5, mask=None, **options):
    """Compute a step of batch renormalization: scale · r and bias + scale · d."""
    mu, var = batch_moments(case, axis, mask)
    std = np.sqrt(case.var.astype(np.float64) + epsilon)
    r = np.clip(np.sqrt(var + epsilon) / std, 1 / r_max, r_max)
    d = np.clip((mu - case.mean) / std, -d_max, d_max)
    corrected = case._replace(scale=case.scale * r, bias=case.bias + case.scale * d)
    step = train_step(corrected, axis=axis, epsilon=epsilon, mask=mask, **options)
    sizes = {**step.sizes, "dscale": np.max(r * step.sizes["dscale"])}
    return step._replace(dscale=r * step.dscale + d * step.dbias, sizes=sizes)


def virtual_step(
    case, size, *, axis=-1, momentum=0.99, unbiased=True, mask=None, **options
):
    """Compute a step of ghost batch norm, group by group along the first reduced axis.

    Each group is a training step of its own whose momentum is 0, so that it returns the
    statistics of the group alone.
    """
    case = Case(*(np.asarray(a, np.float64) for a in case))
    features = {a % case.x.ndim for a in (axis if isinstance(axis, tuple) else (axis,))}
    batch_axis = next(a for a in range(case.x.ndim) if a not in features)
    mask = np.broadcast_to(1 if mask is None else mask, case.x.shape)
    groups = case.x.shape[batch_axis] // size
    split = [np.split(a, groups, batch_axis) for a in (case.x, case.dy, mask)]
    weights = [flatten_elements(w.astype(np.float64), axis) for w in split[2]]
    is_float = mask.dtype.kind in "fV"
    ns = [effective_size(w) if is_float else w.sum(0) for w in weights]
    updates = [n > unbiased for n in ns]
    number = np.sum(updates, 0)
    keep = case.batches / (case.batches + 1) if momentum is None else momentum
    share = (1 - keep) / np.where(number > 0, number, 1)
    steps = []
    for x, dy, w, used in zip(*split, updates, strict=True):
        part = case._replace(x=x, dy=dy, dmean=share * case.dmean * used)
        part = part._replace(dvar=share * case.dvar * used)
        options = {**options, "unbiased": unbiased, "momentum": 0.0}
        steps.append(train_step(part, axis=axis, mask=w, **options))

    def average(name, old):
        new = sum(
            np.where(u, getattr(s, name), 0)
            for u, s in zip(updates, steps, strict=True)
        )
        return np.where(number > 0, keep * old + share * new, old)

    def add(name):
        return np.sum([getattr(s, name) for s in steps], 0)

    old_share = np.where(number > 0, keep, 1)
    return Result(
        y=np.concatenate([s.y for s in steps], batch_axis),
        mean=average("mean", case.mean),
        var=average("var", case.var),
        dx=np.concatenate([s.dx for s in steps], batch_axis),
        dscale=add("dscale"),
        dbias=add("dbias"),
        dmean=add("dmean") + old_share * case.dmean,
        dvar=add("dvar") + old_share * case.dvar,
        sizes={k: sum(s.sizes[k] for s in steps) for k in steps[0].sizes},
    )


def inference(case, *, axis=-1, epsilon=1e-5) -> Result:
    """Compute inference and its gradients."""
    case = Case(*(np.asarray(a, np.float64) for a in case))
    x, dy = flatten_elements(case.x, axis), flatten_elements(case.dy, axis)
    inv_std = 1 / np.sqrt(case.var + epsilon)
    x_hat = (x - case.mean) * inv_std
    dx_hat = dy * case.scale
    return Result(
        y=unflatten_elements(case.scale * x_hat + case.bias, case.x.shape, axis),
        mean=case.mean,
        var=case.var,
        dx=unflatten_elements(dx_hat * inv_std, case.x.shape, axis),
        dscale=(dy * x_hat).sum(0),
        dbias=dy.sum(0),
        dmean=case.dmean - (dx_hat * inv_std).sum(0),
        dvar=case.dvar - 0.5 * (dx_hat * (x - case.mean) * inv_std**3).sum(0),
    )
