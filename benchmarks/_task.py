"""The inputs of every library, and the expected results in NumPy float64."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ._shapes import Shape

EPSILON = 1e-5
# Relative to each array's largest entry. Loose, because it only confirms that a library
# computes the same function; `_accuracy.py` measures errors. dscale and dbias are not
# checked in bfloat16: some libraries sum in bfloat16, with errors above 10%.
TOLERANCE = {
    "float32": {"y": 1e-3, "dx": 1e-3, "dscale": 1e-3, "dbias": 1e-3},
    "bfloat16": {"y": 6e-2, "dx": 6e-2},
}


class Task(NamedTuple):
    """Hold a layer's input, variables and cotangent; `x` and `dy` are in `dtype`."""

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
        """Return the feature axis as a nonnegative number."""
        return self.shape.axis % self.x.ndim

    @property
    def features(self) -> int:
        """Return the number of features."""
        return self.x.shape[self.axis]


class Results(NamedTuple):
    """Hold a layer's results; with momentum 0, `mean` and `var` are of the batch."""

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
    """Return random arrays; x has mean `loc` and standard deviation 1."""
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


def reference(task: Task) -> Results:
    """Compute the results in float64 by the closed form, in blocks of features."""
    columns = [_reference_block(task, block) for block in _blocks(task)]
    y, dx, *vectors = (np.concatenate(c, -1) for c in zip(*columns, strict=True))
    dims = np.moveaxis(task.x, task.axis, -1).shape
    y, dx = (np.moveaxis(a.reshape(dims), -1, task.axis) for a in (y, dx))
    return Results(y, dx, *vectors)


def _blocks(task: Task) -> list[slice]:
    return [slice(i, i + 16) for i in range(0, task.features, 16)]


def _reference_block(task: Task, block: slice) -> tuple[np.ndarray, ...]:
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


def find_mismatch(task: Task, got: Results, expected: Results) -> str | None:
    """Describe the first wrong result, or return None if all are within tolerance."""
    for name, tolerance in TOLERANCE[task.dtype].items():
        error = max_error(getattr(got, name), getattr(expected, name))
        if not error <= tolerance:  # true for NaN as well
            return f"{name} is off by {error:.1g} of its largest entry"
    return None


def max_error(got: Any, expected: np.ndarray) -> float:
    """Return the largest error over the largest entry; infinite if shapes differ."""
    got = np.asarray(got)
    if got.shape != expected.shape:
        return np.inf
    return float(
        np.abs(got.astype(np.float32) - expected).max() / np.abs(expected).max()
    )
