"""The layers beside Flax's: every option, value and gradient, by one table.

Flax's default variance is accurate for the means near zero that are used here.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax_helpers import assert_same, everything, randomize
from layer_apis import APIS

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
OPTIONS = [
    *((scale, bias, "float32", "float32") for scale in USED for bias in USED),
    *((True, True, *dtypes) for dtypes in OTHER_DTYPES),
    (False, False, "bfloat16", "bfloat16"),
]
LAYERS = [("linen", -1), ("linen", 1), ("linen", (3, 1)), ("nnx", -1), ("nnx", 1)]
CALLS = [(mask, train) for mask in MASKS for train in (True, False)]


@pytest.mark.parametrize(
    ("use_scale", "use_bias", "dtype", "param_dtype", "api", "axis", "mask", "train"),
    # Each of the options with each layer, and both with each kind of call.
    [
        (*options, *layer, *CALLS[(i + j) % len(CALLS)])
        for i, options in enumerate(OPTIONS)
        for j, layer in enumerate(LAYERS)
    ],
)
def test_values_and_gradients_equal_flax(
    use_scale, use_bias, dtype, param_dtype, api, axis, mask, train, rng
):
    options = {
        "axis": axis,
        "momentum": 0.8,
        "epsilon": 1e-3,
        "dtype": dtype,
        "param_dtype": param_dtype,
        "use_bias": use_bias,
        "use_scale": use_scale,
    }
    layer, flax = (APIS[api](lib, SHAPE, **options) for lib in ("jaxbn", "flax"))
    assert_same(layer.variables, flax.variables, 0)
    x = jnp.asarray(0.7 + 1.9 * rng.normal(size=SHAPE), dtype)
    variables = randomize(rng, layer.variables)
    steps = (partial(n.apply, train=train, mask=MASKS[mask]) for n in (layer, flax))
    actual, expected = (jax.jit(partial(everything, s))(variables, x) for s in steps)
    assert_same(actual, expected, max(TOLERANCE[dtype], TOLERANCE[param_dtype]))
