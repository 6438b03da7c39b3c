"""Our Flax layers beside Flax's own: one table of options, every value and gradient.

Flax's default variance is right for the means near zero that are used here. What is
particular to linen or nnx is in `test_linen.py` and `test_nnx.py`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax_helpers import assert_same, everything, randomize

import jaxbn

pytestmark = pytest.mark.usefixtures("standard_promotion")
SHAPE = (6, 4, 2, 3)
TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2}  # of each array's largest entry
MASKS = {
    "no mask": None,
    "elements": np.random.default_rng(7).random(SHAPE) < 0.7,
}
USED = (True, False)
OTHER_DTYPES = [
    ("float32", "bfloat16"), ("bfloat16", "float32"), ("bfloat16", "bfloat16"),
]  # fmt: skip
LAYERS = [("linen", -1), ("linen", 1), ("linen", (3, 1)), ("nnx", -1), ("nnx", 1)]


def linen_step(layer, train, mask):
    """(variables, x) -> (y, new statistics), and the variables to start from."""
    variables = layer.init(jax.random.key(0), jnp.zeros(SHAPE), True)

    def step(variables, x):
        y, updates = layer.apply(
            variables, x, not train, mask=mask, mutable=["batch_stats"]
        )
        return y, updates["batch_stats"]

    return step, variables


def nnx_step(layer, train, mask):
    graphdef, state = nnx.split(layer)

    def step(state, x):
        layer = nnx.merge(graphdef, state)
        y = layer(x, use_running_average=not train, mask=mask)
        return y, nnx.state(layer, nnx.BatchStat)

    return step, state


def pair(kind, **options: Any) -> tuple[Any, Any]:
    """Our layer, Flax's layer."""
    if kind == "linen":
        return jaxbn.linen.BatchNorm(**options), nn.BatchNorm(**options)
    options |= {"num_features": SHAPE[options["axis"]], "rngs": nnx.Rngs(0)}
    return jaxbn.nnx.BatchNorm(**options), nnx.BatchNorm(**options)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("kind", "axis"), LAYERS)
@pytest.mark.parametrize(
    ("use_scale", "use_bias", "dtype", "param_dtype"),
    [
        *((scale, bias, "float32", "float32") for scale in USED for bias in USED),
        *((True, True, *dtypes) for dtypes in OTHER_DTYPES),
        (False, False, "bfloat16", "bfloat16"),
    ],
)
def test_equals_flax(
    use_scale, use_bias, dtype, param_dtype, kind, axis, mask, train, rng
):
    ours, theirs = pair(
        kind,
        axis=axis,
        momentum=0.8,
        epsilon=1e-3,
        dtype=dtype,
        param_dtype=param_dtype,
        use_bias=use_bias,
        use_scale=use_scale,
    )
    make_step = {"linen": linen_step, "nnx": nnx_step}[kind]
    step, initial = make_step(ours, train, MASKS[mask])
    their_step, their_initial = make_step(theirs, train, MASKS[mask])
    assert_same(initial, their_initial, 0)
    x = jnp.asarray(0.7 + 1.9 * rng.normal(size=SHAPE), dtype)
    variables = randomize(rng, initial)
    assert_same(
        everything(step, variables, x),
        everything(their_step, variables, x),
        max(TOLERANCE[dtype], TOLERANCE[param_dtype]),
    )
