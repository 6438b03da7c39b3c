"""The snippets of the documentation pages run."""

import re
from pathlib import Path

import jax
import numpy as np

DOCS = Path(__file__).parent.parent / "docs"


def run_page(name):
    text = (DOCS / name).read_text()
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        exec(block, names)
    return names


def test_many_devices():
    names = run_page("many_devices.md")
    x = np.asarray(names["x"], np.float64)
    expected = 0.01 * x.mean(0)
    np.testing.assert_allclose(names["same_state"].mean, expected, atol=1e-6)
    np.testing.assert_allclose(names["same_y"], (x - x.mean(0)) / x.std(0), atol=1e-4)
    np.testing.assert_allclose(names["new_state"].mean, 0.01 * x[:5].mean(0), atol=1e-6)
    assert len(jax.devices()) == 8


def test_from_training_to_inference():
    with jax.numpy_dtype_promotion("standard"):  # optax and Flax need it
        names = run_page("from_training_to_inference.md")
        expected = names["model"].apply(names["variables"], names["images"])
        nnx_model, folded = names["nnx_model"], names["folded_nnx_model"]
        np.testing.assert_allclose(
            folded(names["images"]), nnx_model(names["images"]), atol=1e-5
        )
    np.testing.assert_allclose(names["logits"], expected, atol=1e-5)
    np.testing.assert_allclose(names["answer"], expected[:5], atol=1e-5)

    variables, tuned = names["variables"], names["tuned"]
    x = conv(names["images"], variables["params"]["Conv_0"]["kernel"])
    stats = variables["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(stats["mean"], x.mean((0, 1, 2)), rtol=1e-5)
    for name, values in tuned["params"]["BatchNorm_0"].items():
        np.testing.assert_array_equal(values, variables["params"]["BatchNorm_0"][name])
    kernels = (v["params"]["Conv_0"]["kernel"] for v in (tuned, variables))
    assert np.abs(np.subtract(*kernels)).min() > 0

    stats = names["converted"]["batch_stats"]["BatchNorm_0"]
    np.testing.assert_array_equal(stats["mean"], np.arange(4))
    kept = {"bn1.num_batches_tracked": 0}  # Flax's layers count no batches
    for name, values in (names["state_dict"] | kept).items():
        np.testing.assert_array_equal(names["back"][name], values)


def conv(x, kernel):
    """3 x 3, padded with zeros, in float64."""
    x, kernel = (np.asarray(a, np.float64) for a in (x, kernel))
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    return np.einsum("nhwcij,ijco->nhwo", windows, kernel)
