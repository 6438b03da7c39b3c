"""Test the snippets and the numbers of the pages "Choosing an API" and "FAQ"."""

import importlib.util
import inspect
import itertools
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from helpers import saved_bytes
from oracle import Case, train_step
from pages import DOCS, code_blocks, run_page

import jaxbn
import jaxbn.linen
import jaxbn.nnx

EPSILON = 1e-5
ARGUMENTS = {"params", "state", "x", "train"}


@pytest.fixture(scope="module")
def faq():
    with jax.numpy_dtype_promotion("standard"):  # optax and Flax need it
        return run_page("faq.md")


@pytest.fixture(scope="module")
def choosing():
    with jax.numpy_dtype_promotion("standard"):
        return run_page("choosing.md")


def float64(*arrays):
    return [np.asarray(a, np.float64) for a in arrays]


def normalized(x, axis: Any = 0):
    """Normalize x by its biased statistics over `axis`."""
    (x,) = float64(x)
    mean = x.mean(axis, keepdims=True)
    return (x - mean) / np.sqrt(x.var(axis, keepdims=True) + EPSILON)


def near(actual, expected, tolerance=1e-5):
    np.testing.assert_allclose(
        np.asarray(actual, np.float64), expected, rtol=tolerance, atol=tolerance
    )


# Choosing


def case(x, scale, bias, mean, var, dy):
    zeros = np.zeros_like(mean)
    return Case(x, scale, bias, mean, var, dy, zeros, zeros)


def train_network(x, target, kernel, *, steps=20, rate=0.01, unbiased=True):
    """Train the network of the page (dense, batch norm, ReLU, sum) in float64."""
    features = kernel.shape[1]
    scale, bias = np.ones(features), np.zeros(features)
    mean, var, loss = np.zeros(features), np.ones(features), np.nan
    for _ in range(steps):
        h, zeros = x @ kernel, np.zeros((len(x), features))
        y = train_step(case(h, scale, bias, mean, var, zeros)).y
        error = np.maximum(y, 0).sum(-1) - target
        loss = np.mean(error**2)
        dy = 2 / len(x) * error[:, None] * (y > 0)
        new = train_step(
            case(h, scale, bias, mean, var, dy), momentum=0.9, unbiased=unbiased
        )
        mean, var = new.mean, new.var
        scale, bias = scale - rate * new.dscale, bias - rate * new.dbias
        kernel = kernel - rate * x.T @ new.dx
    return loss, kernel, scale, bias, mean, var


def test_function_linen_and_nnx_match_oracle_training(choosing):
    start = float64(choosing["x"], choosing["target"], choosing["kernel"])
    loss, *_ = trained = train_network(*start)
    assert loss < 0.5 * train_network(*start, steps=1)[0]

    params, state = choosing["params"], choosing["state"]
    function = choosing["function_loss"], params["kernel"], *params["norm"], *state[:2]
    for actual, expected in zip(function, trained, strict=True):
        near(actual, expected, 1e-4)

    trained = train_network(*start, unbiased=False)
    tree, stats = (choosing["variables"][name] for name in ("params", "batch_stats"))
    norm, stats = tree["BatchNorm_0"], stats["BatchNorm_0"]
    linen = [choosing["linen_loss"], tree["Dense_0"]["kernel"]]
    linen += [norm["scale"], norm["bias"], stats["mean"], stats["var"]]
    model = choosing["model"]
    nnx_model = [choosing["nnx_loss"], model.dense.kernel[...]]
    nnx_model += [getattr(model.norm, n)[...] for n in ("scale", "bias", "mean", "var")]
    for actual in (linen, nnx_model):
        for got, expected in zip(actual, trained, strict=True):
            near(got, expected, 1e-4)


def test_function_and_layer_variances_differ_by_32_over_31(choosing):
    start = 0.9**20  # the remaining weight of the initial 1
    layer = choosing["variables"]["batch_stats"]["BatchNorm_0"]["var"] - start
    near((choosing["state"].var - start) / layer, 32 / 31)
    assert "32/31" in (DOCS / "choosing.md").read_text()


@pytest.mark.parametrize("name", ["function", "linen", "nnx"])
def test_training_step_snippets_are_short(name):
    text = (DOCS / "choosing.md").read_text()
    (block,) = (block for block in code_blocks(text) if f"{name}_loss" in block)
    assert len([line for line in block.splitlines() if line]) <= 25


def test_replaced_layer_matches_flax_on_ordinary_data(choosing):
    assert choosing["difference"] < 5e-6
    near(choosing["after"], normalized(choosing["x"]))


@pytest.mark.parametrize(
    ("norm", "mean", "mean_of_none"),
    [(nn.BatchNorm, (3 + 11) / 2, np.nan), (jaxbn.linen.BatchNorm, 23 / 5, 0)],
)
def test_masked_shards_are_averaged_only_by_flax(norm, mean, mean_of_none):
    layer = norm(use_running_average=False, axis_name="data", momentum=0.0)
    variables = layer.init(jax.random.key(0), jnp.ones((2, 1)))

    def running_mean(x, mask):
        _, new = layer.apply(variables, x, mask=mask, mutable=["batch_stats"])
        return new["batch_stats"]["mean"]

    mapped = jax.vmap(running_mean, axis_name="data", out_axes=None)
    x = jnp.array([[1.0, 2, 3, 6], [11.0, 0, 0, 0]])[..., None]
    mask = jnp.array([[1, 1, 1, 1], [1, 0, 0, 0]], bool)[..., None]
    near(mapped(x, mask), mean)
    near(mapped(x, mask & False), mean_of_none)


def test_bfloat16_layer_rounds_only_flax_statistics():
    for norm, expected in ((nnx.BatchNorm, 0.0), (jaxbn.nnx.BatchNorm, 0.2)):
        layer = norm(1, dtype=jnp.bfloat16, use_running_average=True, rngs=nnx.Rngs(0))
        layer.mean[...] = jnp.full(1, 100.3)
        y = layer(jnp.full((1, 1), 100.5, jnp.bfloat16))
        near(y, expected, 1e-2)


def test_replace_and_restore_switch_a_model_over_and_back():
    model = nnx.Sequential(nnx.BatchNorm(2, rngs=nnx.Rngs(0)))
    jaxbn.nnx.replace_batch_norm(model)
    assert type(model.layers[0]) is jaxbn.nnx.BatchNorm
    jaxbn.nnx.restore_batch_norm(model)
    assert type(model.layers[0]) is nnx.BatchNorm


def test_converted_torch_layer_trains_by_the_torch_rule(choosing):
    (x,) = float64(choosing["images"])
    axes = (0, 2, 3)
    mean, var = x.mean(axes), x.var(axes, ddof=1)
    near(choosing["y"], 2 * normalized(x, axes))
    near(choosing["torch_stats"].mean, 0.9 * 1 + 0.1 * mean)
    near(choosing["torch_stats"].var, 0.9 * 4 + 0.1 * var)
    assert choosing["torch_stats"].count == 6


def test_other_libraries_have_the_stated_defaults():
    """The source is read, so that none of the libraries is imported."""
    keras = source_of("keras/src/layers/normalization/batch_normalization.py")
    assert "momentum=0.99,\n        epsilon=1e-3," in keras
    equinox = source_of("equinox/nn/_batch_norm.py")
    assert "eps: float = 1e-5" in equinox
    assert "momentum: float = 0.99" in equinox
    haiku = source_of("haiku/_src/batch_norm.py")
    assert "decay_rate: float,\n      eps: float = 1e-5" in haiku
    for layer in (nn.BatchNorm(), nnx.BatchNorm(1, rngs=nnx.Rngs(0))):
        assert (layer.momentum, layer.epsilon) == (0.99, 1e-5)


def source_of(path):
    package, _, rest = path.partition("/")
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return (Path(spec.origin).parent / rest).read_text()


def test_option_table_states_the_defaults():
    text = (DOCS / "choosing.md").read_text()
    table = text.split("| option | default |")[1].split("\n\n")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|;]+)", table, re.MULTILINE))
    parameters = inspect.signature(jaxbn.batch_norm).parameters
    assert rows.keys() | {"axis_index_groups"} == parameters.keys() - ARGUMENTS
    assert rows.pop("dtype") == "that of `x` "
    for name, default in rows.items():
        default = default.strip('`" ').replace("1e-5", "1e-05")
        assert default == str(parameters[name].default)
    assert not jaxbn.nnx.BatchNorm.unbiased


@pytest.mark.parametrize(
    ("momentum", "left", "steps", "batches"),
    [
        (0.9, "0.003%", 44, 19),
        (0.99, "37%", 459, 199),
        (0.999, "90%", 4603, 1999),
    ],
)
def test_momentum_table_matches_batch_norm(momentum, left, steps, batches):
    row = f"| {momentum} | {left} | {steps} | {batches} batches |"
    assert row in (DOCS / "choosing.md").read_text()
    ones = jnp.ones((2, 1))  # mean 1 and variance 0

    def step(state, _):
        norm = jaxbn.batch_norm(
            jaxbn.init(1)[0], state, ones, train=True, momentum=momentum
        )
        return norm[1], norm[1].var[0]

    _, weights = jax.lax.scan(step, jaxbn.init(1)[1], length=steps)
    assert weights[-1] < 0.01 <= weights[-2]
    stated = left.removesuffix("%")
    digits = len(stated.partition(".")[2])
    assert round(100 * momentum**100, digits) == float(stated)
    assert round((1 + momentum) / (1 - momentum)) == batches


def test_running_mean_at_momentum_0_9_averages_19_batches():
    """The squares of the weights of 400 batches sum to 1/19."""
    params, state = jaxbn.init(400)

    def step(state, batch):
        new = jaxbn.batch_norm(params, state, batch, train=True, momentum=0.9)[1]
        return new, None

    each = jnp.eye(400)[:, None] * jnp.ones((1, 2, 1))
    state, _ = jax.lax.scan(step, state, each)
    near(1 / (float64(state.mean)[0] ** 2).sum(), 19)


def test_momentum_of_pytorch_keeps_the_last_batch_or_two(faq):
    """At 0.1 the last batch weighs 0.9, and the last two 0.99."""
    params, state = faq["params"], faq["state"]
    for batch in range(4):
        x = jnp.full((2, 4), 10.0**batch)
        _, state = jaxbn.batch_norm(params, state, x, train=True, momentum=0.1)
    near(state.mean, np.full(4, 0.9 * 1000 + 0.09 * 100 + 0.009 * 10 + 0.0009))


def test_keras_epsilon_leaves_small_variances_below_one():
    x = np.sqrt(1e-3) * jnp.array([[1.0], [-1.0]])
    y, _ = jaxbn.batch_norm(*jaxbn.init(1), x, train=True, epsilon=1e-3)
    near(y.std(), 0.71, 5e-3)


def test_output_is_invariant_to_scale_and_bias_before(choosing):
    x, kernel = choosing["x"], choosing["kernel"]
    expected = normalized(float64(x)[0] @ float64(kernel)[0])
    near(choosing["plain"], expected)
    near(choosing["shifted_and_scaled"], expected, 2e-5)

    def loss(kernel):
        y, _ = jaxbn.batch_norm(*jaxbn.init(8), x @ kernel, train=True)
        return jnp.sum(jnp.tanh(y) * jnp.sin(x @ choosing["kernel"]))

    near(10 * jax.grad(loss)(10 * kernel), jax.grad(loss)(kernel), 1e-3)


def test_two_values_normalize_to_their_signs(choosing):
    near(choosing["signs"], [[-1, 1], [1, -1]], 1e-3)


def test_statistics_over_time_leak_the_future(choosing):
    assert choosing["leak"] > 0.5


def test_one_image_has_1024_elements_per_channel(rng):
    x = jnp.asarray(rng.normal(size=(1, 32, 32, 1)), jnp.float32)
    y, state = jaxbn.batch_norm(*jaxbn.init(1), x, train=True, momentum=0.0)
    near(state.var, float64(x)[0].var() * 1024 / 1023)
    near(y, normalized(x, (0, 1, 2)))


# Questions


def test_train_eval_gap_comes_from_initial_statistics(faq):
    (x,) = float64(faq["x"])
    mean, var = x.mean(0), x.var(0, ddof=1)
    for kept, shift, ratio in (
        (0.99**20, faq["shift"], faq["ratio"]),
        (0.9**100, faq["good_shift"], faq["good_ratio"]),
    ):
        running = kept + (1 - kept) * var
        near(shift, -kept * mean / np.sqrt(var + EPSILON))
        near(ratio, np.sqrt((running + EPSILON) / (var + EPSILON)))
    near(faq["shift"].mean(), -1.2, 0.1)
    assert (round(0.99**20, 2), round(0.99**100, 2)) == (0.82, 0.37)
    near(faq["alone"], 0)


def test_dropped_state_keeps_count_0(faq):
    assert faq["state"].count == 0
    assert faq["train"](3, 0.9).count == 3


def test_population_repairs_the_statistics_of_a_short_run(rng):
    """The page uses this to tell bad statistics from bad weights."""
    x = jnp.asarray(3 + 2 * rng.normal(size=(32, 4)), jnp.float32)
    model: Any = jaxbn.linen.BatchNorm(use_running_average=True)
    variables = model.init(jax.random.key(0), x)
    assert np.abs(model.apply(variables, x).mean(0)).min() > 1
    repaired = jaxbn.linen.population(model, variables, [x])
    (x,) = float64(x)
    expected = (x - x.mean(0)) / np.sqrt(x.var(0, ddof=1) + EPSILON)
    near(model.apply(repaired, x.astype(np.float32)), expected)


def test_biased_and_unbiased_variance_differ_by_n_over_n_minus_1(faq):
    (x,) = float64(faq["x"])
    near(faq["biased"].var, x.var(0))
    near(faq["unbiased"].var, x.var(0, ddof=1))
    near(faq["factor"], 32 / 31)
    text = (DOCS / "faq.md").read_text()
    assert "n/(n-1) is 1.14 at n = 8, 1.03 at 32 and 1.001 at 1000" in text
    ratios = [(8, 2, 1.14), (32, 2, 1.03), (1000, 3, 1.001)]
    assert all(round(n / (n - 1), digits) == r for n, digits, r in ratios)


def test_features_of_at_most_one_element_keep_the_state(faq):
    start = faq["state"]
    near(faq["one"], 0)
    for after in ("after_one", "after_none", "after_masked"):
        for new, old in zip(faq[after], start, strict=True):
            np.testing.assert_array_equal(new, old)
    near(faq["served"], float64(faq["x"])[0] / np.sqrt(1 + EPSILON))


@pytest.mark.parametrize(("unbiased", "var"), [(False, 0.99), (True, 1.0)])
def test_layer_updates_statistics_by_one_element_as_flax(unbiased, var):
    layer = jaxbn.nnx.BatchNorm(1, unbiased=unbiased, rngs=nnx.Rngs(0))
    near(layer(jnp.full((1, 1), 5.0)), 0)
    near(layer.var[...], var)
    near(layer.mean[...], 0.0 if unbiased else 0.05)


def test_gradients_of_tiny_batches_are_finite(faq):
    for rows, mask in ((1, None), (0, None), (32, faq["nothing"])):

        def loss(params, x, mask=mask):
            y, _ = jaxbn.batch_norm(params, faq["state"], x, train=True, mask=mask)
            return jnp.sum(y**3)

        grads = jax.grad(loss, argnums=(0, 1))(faq["params"], faq["x"][:rows])
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_micro_batches_update_the_statistics_k_times(faq):
    (x,) = float64(faq["x"])
    keep, mean, var = 0.9 ** (1 / 4), np.zeros(4), np.ones(4)
    for micro_batch in x.reshape(4, 8, 4):
        mean = keep * mean + (1 - keep) * micro_batch.mean(0)
        var = keep * var + (1 - keep) * micro_batch.var(0, ddof=1)
    near(faq["accumulated"].mean, mean)
    near(faq["accumulated"].var, var)
    near(faq["own_y"], normalized(x.reshape(4, 8, 4), 1))
    near(faq["accumulated"].mean, faq["whole_state"].mean, 0.01)


def test_vmap_with_axis_name_equals_the_whole_batch(faq):
    (x,) = float64(faq["x"])
    near(faq["whole_y"].reshape(32, 4), normalized(x))
    near(faq["whole_state"].mean, 0.1 * x.mean(0))
    near(faq["whole_state"].var, 0.9 + 0.1 * x.var(0, ddof=1))


def test_unbiased_variance_of_micro_batches_is_right_on_average(rng):
    x = rng.normal(size=6)
    halves = np.array([x[list(rows)] for rows in itertools.combinations(range(6), 3)])
    _, states = jax.vmap(
        lambda rows: jaxbn.batch_norm(
            *jaxbn.init(1), rows[:, None], train=True, momentum=0.0
        )
    )(jnp.asarray(halves, jnp.float32))
    near(states.var.mean(), x.var(ddof=1))


def test_remat_updates_the_statistics_once(faq):
    (x,) = float64(faq["x"])
    near(faq["new_state"].mean, 0.01 * x.mean(0))
    pairs = zip(
        jax.tree.leaves((faq["remat_grads"], faq["remat_state"])),
        jax.tree.leaves((faq["grads"], faq["new_state"])),
        strict=True,
    )
    for remat, plain in pairs:
        near(remat, plain, 1e-6)


def test_flax_remat_updates_the_statistics_once(faq):
    x, expected = faq["x"], 0.01 * float64(faq["x"])[0].mean(0)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.remat(jaxbn.linen.BatchNorm)(use_running_average=False)(x)

    variables = Net().init(jax.random.key(0), x)

    def loss(params):
        tree = {**variables, "params": params}
        y, new = Net().apply(tree, x, mutable=["batch_stats"])
        return jnp.sum(y**3), new["batch_stats"]

    _, stats = jax.grad(loss, has_aux=True)(variables["params"])
    near(stats["CheckpointBatchNorm_0"]["mean"], expected)

    layer = jaxbn.nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    forward = nnx.remat(lambda layer, x: layer(x))
    nnx.grad(lambda layer: jnp.sum(forward(layer, x) ** 3))(layer)
    near(layer.mean[...], expected)


def test_masks_exclude_and_weight_elements(faq):
    (series,) = float64(faq["sequences"])
    valid = np.concatenate([series[0], series[1, :2]])
    near(faq["masked"].mean, valid.mean(0))
    near(faq["masked"].var, valid.var(0, ddof=1))
    (x,) = float64(faq["x"])
    twice = np.concatenate([x[:1], x])
    near(faq["weighted"].mean, twice.mean(0))
    near(faq["weighted"].var, twice.var(0, ddof=1))


@pytest.mark.parametrize("scale", [1 / 32, 1000.0])
@pytest.mark.parametrize("unbiased", [True, False])
def test_scale_of_weights_does_not_matter(unbiased, scale, faq):
    args, weights = (faq["params"], faq["state"], faq["x"]), jnp.full((32, 1), scale)
    _, new = jaxbn.batch_norm(*args, train=True, mask=weights, unbiased=unbiased)
    (x,) = float64(faq["x"])
    near(new.mean, 0.01 * x.mean(0))
    near(new.var, 0.99 + 0.01 * x.var(0, ddof=int(unbiased)))


def test_layer_reads_integer_masks_as_bools(faq):
    layer = jaxbn.nnx.BatchNorm(4, momentum=0.0, rngs=nnx.Rngs(0))
    layer(faq["x"], mask=faq["weights"])
    near(layer.mean[...], float64(faq["x"])[0].mean(0))


def test_half_precision_rounds_y_once(faq):
    (x,) = float64(faq["half"].astype(jnp.float32))
    near(faq["half_state"].mean, 0.01 * x.mean(0))
    near(faq["half_state"].var, 0.99 + 0.01 * x.var(0, ddof=1))
    assert faq["half_y"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(faq["half_y"], faq["wide_y"].astype(jnp.bfloat16))
    for half, wide in zip(faq["half_state"], faq["wide_state"], strict=True):
        assert half.dtype == wide.dtype
        near(half, wide, 1e-6)


def test_bfloat16_spacing_matches_the_page():
    assert jnp.bfloat16(1) + jnp.bfloat16(0.003) == 1
    up = jnp.nextafter(jnp.bfloat16(100), jnp.bfloat16(200))
    assert float(up) == 100.5


def test_scan_over_layers_keeps_statistics_per_layer(faq):
    (h,) = float64(faq["x"])
    for layer in range(3):
        near(faq["layer_states"].mean[layer], 0.01 * h.mean(0))
        h = np.tanh(normalized(h))
    near(faq["last"], h)


def test_vmap_over_members_keeps_statistics_per_member(faq):
    for member, times in enumerate((1, 10)):
        mean = times * float64(faq["x"])[0].mean(0)
        near(faq["member_states"].mean[member], 0.01 * mean)


def test_vmap_over_rows_needs_an_axis_name(faq):
    def each(row):
        return jaxbn.batch_norm(
            faq["params"], faq["state"], row, train=True, axis_name="rows"
        )

    y, _ = jax.vmap(each, axis_name="rows", out_axes=(0, None))(faq["x"])
    near(y, normalized(faq["x"]))


def test_linen_scan_and_vmap_keep_statistics_per_layer(faq):
    x = faq["x"]
    axes = {"params": 0, "batch_stats": 0}

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, h, _=None):
            norm = jaxbn.linen.BatchNorm(use_running_average=False)
            return jnp.tanh(norm(h)), None

    kinds = {"variable_axes": axes, "split_rngs": {"params": False}}
    scanned = nn.scan(Layer, length=3, **kinds)()
    variables = scanned.init(jax.random.key(0), x)
    _, new = scanned.apply(variables, x, mutable=["batch_stats"])
    stats = new["batch_stats"]["BatchNorm_0"]
    near(stats["mean"], faq["layer_states"].mean)

    mapped = nn.vmap(Layer, axis_size=2, **kinds)()
    variables = mapped.init(jax.random.key(0), faq["members"])
    _, new = mapped.apply(variables, faq["members"], mutable=["batch_stats"])
    stats = new["batch_stats"]["BatchNorm_0"]
    near(stats["mean"], faq["member_states"].mean)


@pytest.mark.usefixtures("x64")
def test_state_keeps_its_dtype_under_x64():
    params, state = jaxbn.init(2)
    x = jnp.ones((4, 2), jnp.float64)
    _, new = jaxbn.batch_norm(params, state, x, train=True)
    assert [leaf.dtype for leaf in new] == ["float32", "float32", "float32"]


def test_nan_feature_leaves_other_features_accurate(faq):
    near(faq["far_y"].std(0), 1, 1e-4)
    start, new = faq["state"], faq["broken_state"]
    (x,) = float64(faq["x"])
    expected = 0.01 * x.mean(0)
    expected[1] = 0
    near(new.mean, expected)
    assert new.var[1] == start.var[1]
    assert np.isnan(faq["broken_y"][:, 1]).all()
    others = [0, 2, 3]
    near(faq["broken_y"][:, np.array(others)], normalized(x)[:, others])


def test_masked_nan_reaches_only_the_gradient(faq):
    x = faq["x"].at[0].set(jnp.nan)
    mask = jnp.arange(32)[:, None] > 0

    def loss(x):
        y, _ = jaxbn.batch_norm(faq["params"], faq["state"], x, train=True, mask=mask)
        return jnp.sum(jnp.where(mask, y, 0) ** 3), y

    grad, y = jax.grad(loss, has_aux=True)(x)
    near(y[1:], normalized(x[1:]))
    assert np.isnan(grad).any()
    grad, _ = jax.grad(loss, has_aux=True)(jnp.where(mask, x, 0))
    assert np.isfinite(grad).all()


def test_squares_beyond_float32_give_zero_output(faq):
    x = jnp.array([[1e20], [-1e20]])
    y, new = jaxbn.batch_norm(*jaxbn.init(1), x, train=True)
    near(y, 0)
    np.testing.assert_array_equal(new.mean, 0)


def energy_gradient(x):
    """Return the gradient of the energy of the page, Σ tanh(y)²."""
    zeros, ones = np.zeros(x.shape[1]), np.ones(x.shape[1])
    y = normalized(x)
    dy = 2 * np.tanh(y) * (1 - np.tanh(y) ** 2)
    return train_step(case(x, ones, zeros, zeros, ones, dy)).dx


def difference(function, x, v, step=1e-5):
    """Return the derivative of `function` at x along v by central differences."""
    x, v = float64(x, v)
    return (function(x + step * v) - function(x - step * v)) / (2 * step)


def test_second_derivatives_match_finite_differences(faq):
    x, v, energy = faq["x"], faq["v"], faq["energy"]
    expected = difference(energy_gradient, x, v)
    near(faq["product"], expected)
    near(jax.grad(lambda x: jnp.vdot(jax.grad(energy)(x), v))(x), expected)
    few, direction = x[:4], v[:4]
    product = np.tensordot(jax.hessian(energy)(few), direction, 2)
    near(product, difference(energy_gradient, few, direction))


def test_forward_mode_needs_plain_autodiff_and_more_memory(faq):
    near(faq["tangent"], difference(normalized, faq["x"], faq["v"]))

    def refused(x):
        return jaxbn.batch_norm(faq["params"], faq["state"], x, train=True)[0]

    with pytest.raises(TypeError, match="can't apply forward-mode"):
        jax.jvp(refused, (faq["x"],), (faq["v"],))
    plain, closed = (saved_bytes(f, faq["x"]) for f in (faq["forward"], refused))
    assert plain > closed


def test_bias_before_has_no_gradient_and_norms_no_decay(faq):
    near(faq["bias_gradient"], 0)
    assert jax.tree.leaves(faq["mask"]["norm"]) == [False, False]
    assert faq["mask"]["kernel"] is True


@pytest.mark.usefixtures("standard_promotion")
def test_adamw_decays_scale_unless_masked(faq):
    tree, zeros = faq["tree"], jax.tree.map(jnp.zeros_like, faq["tree"])
    for mask, scale in ((None, 0.99), (faq["mask"], 1.0)):
        tx = optax.adamw(0.1, weight_decay=0.1, mask=mask)
        updates, _ = tx.update(zeros, tx.init(tree), tree)
        new: Any = optax.apply_updates(tree, updates)
        near(new["norm"].scale, scale)


def test_unequal_shards_are_weighted_by_count(faq):
    (x,) = float64(faq["x"][:20])
    near(faq["synced"].mean, x.mean(0))
    near(faq["synced"].var, x.var(0, ddof=1))


def test_axis_name_needs_a_mapped_axis_only_in_training(faq):
    args = faq["params"], faq["state"], faq["x"]
    with pytest.raises(NameError, match="unbound axis name: data"):
        jaxbn.batch_norm(*args, train=True, axis_name="data")
    jaxbn.batch_norm(*args, train=False, axis_name="data")
    layer = jaxbn.linen.BatchNorm(use_running_average=False, axis_name="data")
    layer.init(jax.random.key(0), faq["x"])


def test_variance_is_accurate_where_use_fast_variance_fails(faq):
    near(faq["our_y"].std(0), 1, 1e-4)
    assert faq["flax_y"].std() > 10
    slow = nn.BatchNorm(use_running_average=False, use_fast_variance=False)
    y, _ = slow.apply(faq["flax_variables"], faq["far"], mutable=["batch_stats"])
    near(y.std(0), 1, 1e-4)


@pytest.mark.usefixtures("standard_promotion")
def test_moving_average_in_bfloat16_stalls_at_1():
    layer = jaxbn.linen.BatchNorm(
        use_running_average=False,
        momentum=0.99,
        param_dtype=jnp.bfloat16,
        force_float32_reductions=False,
    )
    x = jnp.full((8, 1), 1.303)
    variables = layer.init(jax.random.key(0), x)

    def step(variables, _):
        _, updates = layer.apply(variables, x, mutable=["batch_stats"])
        return {**variables, **updates}, None

    variables, _ = jax.lax.scan(step, variables, None, 2000)
    near(variables["batch_stats"]["mean"], 1.0)


@pytest.mark.usefixtures("standard_promotion")
def test_force_float32_reductions_stores_the_dtypes_of_flax():
    x = jnp.ones((4, 2), jnp.bfloat16)
    trees = [
        norm(
            use_running_average=False,
            param_dtype=jnp.bfloat16,
            force_float32_reductions=force,
        ).init(jax.random.key(0), x)
        for norm in (nn.BatchNorm, jaxbn.linen.BatchNorm)
        for force in (True, False)
    ]
    flax_wide, flax_half, wide, half = (
        jax.tree.map(lambda leaf: leaf.dtype, tree) for tree in trees
    )
    assert (flax_wide, flax_half) == (wide, half)
    assert wide["batch_stats"]["mean"] == jnp.float32
    assert half["batch_stats"]["mean"] == jnp.bfloat16


def test_train_state_carries_the_statistics(faq):
    (x,) = float64(faq["x"])
    training = faq["training"]
    near(training.batch_stats["mean"], 0.1 * x.mean(0))
    near(training.batch_stats["var"], 0.9 + 0.1 * x.var(0))
    y = normalized(x)
    near(training.params["scale"], 1 - 0.1 * (4 * y**3 * y).sum(0) / y.size)
    near(training.params["bias"], -0.1 * (4 * y**3).sum(0) / y.size)
    assert training.step == 1


@pytest.mark.parametrize("page", ["faq.md", "choosing.md"])
def test_tables_have_at_most_four_columns_and_links_resolve(page):
    text = (DOCS / page).read_text()
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    rows = [line for line in prose.splitlines() if line.startswith("|")]
    assert rows
    assert max(row.count("|") for row in rows) <= 5
    for target in re.findall(r"\]\(([^)]+)\)", prose):
        if target.startswith("https:"):
            continue
        name, _, anchor = re.sub(r"\s+", "", target).partition("#")
        path = DOCS / (name or page)
        assert path.exists()
        if anchor:
            assert anchor in slugs(path.read_text())


def slugs(text):
    """Return the anchors that MkDocs makes of the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", h.replace("`", "")).lower() for h in headings)
    return {re.sub(r"[\s-]+", "-", h.strip()) for h in plain}
