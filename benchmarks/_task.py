"""What every peer is given, and what it must return: NumPy, float64."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ._shapes import Shape

EPSILON = 1e-5
# Of each array's largest entry. Loose: how accurate a peer is `_accuracy.py` tells, but
# here it only has to show that it does the same work. In bfloat16 some sum over rows in
# bfloat16: their dscale and dbias are off by a tenth and more, so these are not asked.
TOLERANCE = {
    "float32": {"y": 1e-3, "dx": 1e-3, "dscale": 1e-3, "dbias": 1e-3},
    "bfloat16": {"y": 6e-2, "dx": 6e-2},
}


class Task(NamedTuple):
    """A layer's input, parameters, statistics and cotangent; `x`, `dy` in `dtype`."""

    shape: Shape
    dtype: str
    momentum: float
    x: np.ndarray
    dy: np.ndarray
    scale: np.ndarray
    bias: np.ndarray
    mean: np.ndarray
    var: np.ndarray

    @property
    def axis(self) -> int:
        """The feature axis, never negative."""
        return self.shape.axis % self.x.ndim

    @property
    def features(self) -> int:
        """How many channels there are."""
        return self.x.shape[self.axis]


class Results(NamedTuple):
    """What a layer computes; `mean`, `var` are those of the batch (momentum 0)."""

    y: Any
    dx: Any
    dscale: Any
    dbias: Any
    mean: Any
    var: Any


def random_task(
    rng: np.random.Generator,
    shape: Shape,
    dtype: str,
    loc: float = 0.0,
    momentum: float = 0.99,
) -> Task:
    """Random in everything, with deviation 1 about `loc`."""
    kind = np.dtype(jnp.dtype(dtype))
    features = shape.dims[shape.axis]

    def normal(*dims: int) -> np.ndarray:
        return rng.standard_normal(dims, np.float32)

    return Task(
        shape,
        dtype,
        momentum,
        x=(normal(*shape.dims) + np.float32(loc)).astype(kind),
        dy=normal(*shape.dims).astype(kind),
        scale=normal(features),
        bias=normal(features),
        mean=normal(features),
        var=rng.uniform(0.5, 2, features).astype(np.float32),
    )


def truth(task: Task) -> Results:
    """The float64 results, by the closed form, a block of channels at a time."""
    columns = [_channels(task, block) for block in _blocks(task)]
    y, dx, *vectors = (np.concatenate(c, -1) for c in zip(*columns, strict=True))
    dims = np.moveaxis(task.x, task.axis, -1).shape
    y, dx = (np.moveaxis(a.reshape(dims), -1, task.axis) for a in (y, dx))
    return Results(y, dx, *vectors)


def _blocks(task: Task) -> list[slice]:
    return [slice(i, i + 16) for i in range(0, task.features, 16)]


def _channels(task: Task, block: slice) -> tuple[np.ndarray, ...]:
    def columns(a: np.ndarray) -> np.ndarray:
        moved = np.moveaxis(a, task.axis, -1)[..., block]
        return moved.reshape(-1, moved.shape[-1]).astype(np.float64)

    x, dy, scale = columns(task.x), columns(task.dy), task.scale[block]
    mean, var = x.mean(0), x.var(0)
    inv_std = 1 / np.sqrt(var + EPSILON)
    x_hat = (x - mean) * inv_std
    dscale, dbias = (dy * x_hat).sum(0), dy.sum(0)
    dx = scale * inv_std * (dy - (dbias + x_hat * dscale) / len(x))
    y = x_hat * scale + task.bias[block]
    return y.astype(np.float32), dx.astype(np.float32), dscale, dbias, mean, var


def disagreement(task: Task, got: Results, want: Results) -> str | None:
    """What is wrong with y or a gradient, or None where all is near enough."""
    for name, tolerance in TOLERANCE[task.dtype].items():
        off = error(getattr(got, name), getattr(want, name))
        if not off <= tolerance:  # so also where it is NaN
            return f"{name} is off by {off:.1g} of its largest entry"
    return None


def error(got: Any, want: np.ndarray) -> float:
    """The largest error, of the largest entry; shapes must be the same."""
    got = np.asarray(got)
    if got.shape != want.shape:
        return np.inf
    return float(np.abs(got.astype(np.float32) - want).max() / np.abs(want).max())
