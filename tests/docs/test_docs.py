"""Test that the snippets of the pages run and the reference lists every name."""

import ast
import dataclasses
import importlib
import inspect
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from helpers import assert_near, saved_bytes
from pages import DOCS, run_page

import jaxbn


def test_index_snippets_normalize():
    with jax.numpy_dtype_promotion("standard"):  # Flax needs it
        names = run_page("index.md")
    x, y, state = (names[name] for name in ("x", "y", "state"))
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(y.std(0), 1, rtol=1e-5)
    np.testing.assert_allclose(state.mean, x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(state.var, x.var(0, ddof=1), rtol=1e-4)
    expected = (x[:1] - state.mean[None]) / np.sqrt(state.var + 1e-5)[None]
    np.testing.assert_allclose(names["row"], expected, rtol=1e-5)
    assert names["z"].shape == (64, 1)
    assert names["updates"]["batch_stats"]["BatchNorm_0"]["mean"].shape == (8,)


def test_mathematics_snippets_match_jax_derivatives():
    with jax.numpy_rank_promotion("allow"):
        names = run_page("mathematics.md")
    np.testing.assert_allclose(names["closed_form"], names["dx"], atol=1e-5)
    np.testing.assert_allclose(names["tangent"], 0, atol=1e-5)
    np.testing.assert_allclose(names["y"], names["y_of"](names["x"]), atol=1e-5)
    hessian = jax.jit(jax.hessian(names["loss"]))(names["x"])
    expected = np.einsum("ijkl,kl->ij", hessian, names["direction"])
    np.testing.assert_allclose(names["hessian_times_direction"], expected, atol=1e-3)
    by_jax, closed = (saved_bytes(names[f], names["x"]) for f in ("y_by_jax", "y_of"))
    assert by_jax > closed


def test_many_devices_snippets_match_the_whole_batch():
    names = run_page("many_devices.md")
    x = np.asarray(names["x"], np.float64)
    expected = 0.01 * x.mean(0)
    np.testing.assert_allclose(names["same_state"].mean, expected, atol=1e-6)
    np.testing.assert_allclose(names["same_y"], (x - x.mean(0)) / x.std(0), atol=1e-4)
    np.testing.assert_allclose(names["new_state"].mean, 0.01 * x[:5].mean(0), atol=1e-6)
    assert len(jax.devices()) == 8


def test_build_your_own_snippets_compute_the_variants():
    with jax.numpy_rank_promotion("allow"):
        names = run_page("build_your_own.md")
    x, params, state = (names[name] for name in ("x", "params", "state"))
    exact = np.asarray(x, np.float64)
    y = (exact - exact.mean(0)) / exact.std(0)
    assert_near((names["y"], names["new_state"].mean), (y, 0.01 * exact.mean(0)))
    jacobian = jax.jacobian(names["forward"], 3)(params, *state[:2], x[0])[0]
    _, log_det = names["forward"](params, *state[:2], x[0])
    assert_near(log_det, np.linalg.slogdet(jacobian)[1], size=1.0)
    assert_near(names["restored"], x)
    assert_near(names["model"].norm.mean[...], 0.01 * linear_mean(names), 1e-4)
    before, after = (
        names["entropy"](p, names["kernel"], x) for p in (params, names["adapted"])
    )
    assert after < before
    assert_near(names["domains"].mean, 0.01 * np.stack([y := exact.mean(0), y + 9]))
    found = np.asarray(names["found"], np.float64)
    assert_near((found.mean(0), found.var(0)), (np.zeros(3), np.ones(3)), 1e-2, 1.0)
    assert_near(names["ghost_y"], np.concatenate(names["ys"]))
    assert_near(names["whole_y"].reshape(64, 3), names["y"])
    assert_near(names["whole_state"].mean[0], names["new_state"].mean)
    merged = names["merged"]
    assert_near((merged.mean, merged.var), (exact.mean(0), exact.var(0)))


def linear_mean(names):
    """Return the mean of the model's hidden layer: one update, in the first pass."""
    linear = names["model"].linear
    return np.asarray(linear(names["x"]), np.float64).mean(0)


def test_memory_snippets_have_the_gradients_of_the_plain_stages():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        names = run_page("memory.md")
        stage = names["stage"].__wrapped__

        def loss(kernel, x):
            return jnp.mean(stage(kernel, x)[0] ** 2)

        expected = jax.jit(jax.grad(loss))(names["kernel"], names["x"])
        np.testing.assert_allclose(names["gradient"], expected, rtol=1e-5, atol=1e-6)

        apply = jax.jit(names["Stage"]().apply, static_argnames="mutable")
        plain, updates = apply(
            names["variables"], names["images"], mutable=("batch_stats",)
        )
        np.testing.assert_allclose(names["y"], plain, rtol=1e-5, atol=1e-6)
        chex.assert_trees_all_close(names["updates"], updates, rtol=1e-5)

        def nnx_loss(stage):
            return jnp.mean(stage(names["images"]) ** 2)

        plain = nnx.jit(nnx.grad(nnx_loss))(names["nnx_stage"])
        chex.assert_trees_all_close(names["nnx_gradient"], plain, rtol=1e-4, atol=1e-6)


def test_from_training_to_inference_snippets_match_the_model():
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
    both, images = names["both"], np.asarray(names["images"], np.float64)
    np.testing.assert_allclose(both.mean, [images.mean()], rtol=1e-6)
    np.testing.assert_allclose(both.var, [images.var()], rtol=2e-3)
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
    """Convolve with a 3 x 3 kernel and zero padding, in float64."""
    x, kernel = (np.asarray(a, np.float64) for a in (x, kernel))
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    return np.einsum("nhwcij,ijco->nhwo", windows, kernel)


MODULES = ["jaxbn", "jaxbn.linen", "jaxbn.nnx", "jaxbn.convert"]


def public_names(module):
    """Yield the names of `import name as name`, and of functions and classes."""
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.ImportFrom):
            names = [a.name for a in node.names if a.asname == a.name]
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = [node.name]
        else:
            continue
        yield from (name for name in names if not name.startswith("_"))


@pytest.mark.parametrize("module", MODULES)
def test_public_names_have_docstrings(module):
    module = importlib.import_module(module)
    names = list(public_names(module))
    assert len(names) > 5
    for name in names:
        doc = getattr(module, name).__doc__ or ""
        if doc.startswith(f"{name}("):  # generated by dataclass or NamedTuple
            doc = ""
        assert doc.strip(), f"{module.__name__}.{name} has no docstring"


@pytest.mark.parametrize("module", MODULES)
def test_public_names_are_in_the_reference(module):
    pages = "\n".join(page.read_text() for page in DOCS.glob("api/*.md"))
    listed = re.findall(r"^::: (\S+)$", pages, re.MULTILINE)
    assert len(listed) == len(set(listed))
    names = public_names(importlib.import_module(module))
    assert {f"{module}.{name}" for name in names} - set(listed) == set()


def table_of(page):
    """Return name and default of each row of a table of options that has both."""
    text = (DOCS / page).read_text()
    return re.findall(r"^\| `(\w+)` \| `([^|]+)` \|", text, re.MULTILINE)


def test_nnx_layer_arguments_match_the_table():
    rows = dict(table_of("api/nnx.md"))
    parameters = inspect.signature(jaxbn.nnx.BatchNorm.__init__).parameters
    defaults = {name: p.default for name, p in parameters.items()}
    assert [*defaults][2:] == [*rows, "rngs", "bias_metadata", "scale_metadata"]
    for name in ("bias_init", "scale_init", "promote_dtype"):  # functions
        del rows[name], defaults[name]
    stated = {name: eval(default, {"jnp": jnp}) for name, default in rows.items()}
    assert stated == {name: defaults[name] for name in rows}


def test_linen_layer_fields_match_the_table():
    rows = table_of("api/linen.md")
    fields = dataclasses.fields(jaxbn.linen.BatchNorm)
    defaults = {f.name: f.default for f in fields if f.name not in ("parent", "name")}
    stated = {name: eval(default, {"jnp": jnp, "nn": nn}) for name, default in rows}
    assert list(stated) == list(defaults)
    assert stated == defaults


@pytest.mark.parametrize("folder", ["examples", "examples/experiments"])
def test_each_example_is_in_the_table_of_its_folder(folder):
    path = DOCS.parent / folder
    text = (path / "README.md").read_text()
    listed = re.findall(rf"^\| `python {folder}/(\w+\.py)\b", text, re.MULTILINE)
    assert sorted(listed) == sorted(script.name for script in path.glob("[!_]*.py"))


def test_files_that_pages_name_exist():
    root = DOCS.parent
    roots = (root, root / "jaxbn")  # CONTRIBUTING names modules inside the package
    pages = [*DOCS.rglob("*.md"), *root.glob("*.md"), root / "benchmarks/README.md"]
    for page in pages:
        for path in re.findall(r"`((?:\w+/)+\w+\.(?:py|md))[`:]", page.read_text()):
            exists = any((folder / path).exists() for folder in roots)
            assert exists, f"{page.name} names {path}"
