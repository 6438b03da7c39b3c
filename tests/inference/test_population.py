"""Test population statistics of one layer and of every layer in a Flax model."""

import itertools
from functools import cache, partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.core import FrozenDict, freeze
from flax_helpers import assert_same, randomize
from helpers import assert_near
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import effective_size, flatten_elements

import jaxbn

pytestmark = pytest.mark.usefixtures("standard_promotion")
C = 3
SIZES = (8, 8, 5, 1, 3)  # the batch of one element has no unbiased variance
VARIANCES = ("paper", "total")


def oracle(batches, variance, axis=-1, weights=None):
    """Return mean and variance by definition; "total" takes all batches as one."""
    flat = [flatten_elements(np.asarray(x, np.complex128), axis) for x in batches]
    if weights is None:
        weights = [np.ones_like(x, np.float64) for x in flat]
    # Weights have no scale: those of a batch add up to its effective size.
    weights = [
        w * effective_size(w) / np.where(w.sum(0) > 0, w.sum(0), 1) for w in weights
    ]
    x, w = np.concatenate(flat), np.concatenate(weights)
    mean = (w * x).sum(0) / w.sum(0)
    if variance == "total":
        return mean, (w * abs(x - mean) ** 2).sum(0) / (w.sum(0) - 1)
    total, count = 0.0, 0.0
    for x, w in zip(flat, weights, strict=True):
        n = w.sum(0)
        squares = (w * abs(x - (w * x).sum(0) / np.where(n > 0, n, 1)) ** 2).sum(0)
        several = n > 1 + 1e-9
        total += np.where(several, n * squares / np.where(several, n - 1, 1), 0)
        count += np.where(several, n, 0)
    return mean, total / count


def draw(
    rng, sizes=SIZES, features=C, loc=0.7, dtype: Any = np.float32
) -> list[np.ndarray]:
    """Draw batches of different means, so that the two variances differ."""
    return [
        (loc + 2 * rng.normal(size=features) + 1.9 * rng.normal(size=(n, features)))
        .astype(dtype)
        for n in sizes
    ]  # fmt: skip


def variables_of(model, *arguments, **keywords) -> Any:
    """Draw random variables of the model without compiling its `init`."""
    init = partial(model.init, jax.random.key(0), *arguments, **keywords)
    return randomize(np.random.default_rng(1), jax.eval_shape(init))


# One layer.


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize(
    ("axis", "shape"), [(-1, (2, C)), (1, (C, 4)), ((2, 1), (C, 4))]
)
def test_population_matches_oracle_for_feature_axes(rng, variance, axis, shape):
    batches = [
        (rng.normal(size=shape) + rng.normal(size=(n, *shape))).astype(np.float32)
        for n in (4, 3)
    ]
    state = jaxbn.population(iter(batches), axis=axis, variance=variance)
    assert_near(state[:2], oracle(batches, variance, axis), 1e-6)
    assert (state.count, state.count.dtype) == (2, jnp.float32)


@pytest.mark.parametrize("variance", VARIANCES)
def test_population_weights_batches_by_their_size(rng, variance):
    batches = draw(rng)
    state = jaxbn.population(batches, variance=variance)
    assert_near(state[:2], oracle(batches, variance), 1e-6)


def test_equal_batches_match_the_formula_of_the_paper(rng):
    x = rng.normal(size=(6, 4, C))
    state = jaxbn.population(list(x.astype(np.float32)))
    assert_near(state[:2], (x.mean((0, 1)), 4 / 3 * x.var(1).mean(0)), 1e-6)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("kind", ["bool", "weights", "small weights"])
def test_masks_match_oracle_and_hide_nan(rng, variance, kind):
    """Masked elements are NaN, and each feature of the last batch has one element."""
    batches = draw(rng, (8, 8, 4))
    weights = [rng.integers(0, 2, size=(len(x), 1)) * np.ones(C) for x in batches]
    if kind != "bool":
        weights = [w * rng.uniform(0.5, 2, size=w.shape) for w in weights]
    if kind == "small weights":  # with a sum of about 1
        weights = [w / (1 + w.sum(0)) for w in weights]
    weights[2] = np.array([[0, 1, 0, 0]]).T * np.ones(C)
    expected = oracle(batches, variance, weights=weights)
    holed = [np.where(w > 0, x, np.nan) for w, x in zip(weights, batches, strict=True)]
    masks = [w > 0 if kind == "bool" else w.astype(np.float32) for w in weights]
    state = jaxbn.population(zip(holed, masks, strict=True), variance=variance)
    assert_near(state[:2], expected, 1e-6)


@pytest.mark.parametrize("kind", [tuple, list])
@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_pair_may_be_a_list_with_a_mask_of_the_shape_of_x(kind, array, rng):
    """PyTorch's default collate makes lists, and [x, mask] is no array of two."""
    (x,) = draw(rng, (8,))
    mask = rng.integers(0, 2, size=x.shape).astype(np.float32)
    state = jaxbn.population([kind([array(x), array(mask)])])
    assert_near(state[:2], oracle([x], "paper", weights=[mask]), 1e-6)
    state = jaxbn.population([kind([array(x), None])])
    assert_near(state[:2], oracle([x], "paper"), 1e-6)


@pytest.mark.parametrize("mask", [-1.0, np.inf, -1, 0.0])
def test_batch_without_a_positive_sum_of_weights_is_left_out(mask, rng):
    batches = [rng.normal(3, 2, size=(6, 2)).astype(np.float32) for _ in range(3)]
    masks = [np.ones((6, 1), np.asarray(mask).dtype) for _ in range(3)]
    masks[1][0] = mask if mask != -1 else -9
    masks[1][1:] = min(mask, 1) if mask <= 0 else 1
    kept = [batches[0], batches[2]]
    state = jaxbn.population(zip(batches, map(jnp.asarray, masks), strict=True))
    assert_near(tuple(state[:2]), tuple(jaxbn.population(kept)[:2]), 1e-6)
    assert state.count == 2


@pytest.mark.parametrize("scale", [1e-40, 1.0, 3e38])
def test_dominant_weight_of_any_scale(scale, rng):
    """n - 1, twice the share of the small weights, is not rounded."""
    x = rng.normal(3, 2, size=(10, 2)).astype(np.float32)
    mask = np.full((10, 1), 1e-3 * scale, np.float32)
    mask[4] = scale
    w, wide = mask.astype(np.float64) / np.float64(mask[4]), x.astype(np.float64)
    mean = (w * wide).sum(0) / w.sum(0)
    var = (w * (wide - mean) ** 2).sum(0) / w.sum(0)
    pairs = sum((w * np.roll(w, k, 0)).sum(0) for k in range(1, 10))
    dof = pairs / (w**2).sum(0)
    state = jaxbn.population([(x, mask)])
    assert_near(tuple(state[:2]), (mean, var * (1 + dof) / dof), 1e-5)


def test_nested_list_of_numbers_is_an_array(rng):
    (x,) = draw(rng, (2,))
    for rows in (x.tolist(), [list(row) for row in x]):  # of floats, of NumPy's
        assert_near(jaxbn.population([rows])[:2], oracle([x], "paper"), 1e-6)


@pytest.mark.parametrize("variance", VARIANCES)
def test_population_is_accurate_at_a_large_mean(rng, variance):
    batches = [(1e4 + rng.normal(size=(256, C))).astype(np.float32) for _ in range(20)]
    state = jaxbn.population(batches, variance=variance)
    mean, var = oracle(batches, variance)
    assert_near(state[:1], (mean,), 1e-7)
    # In float32 the means of the batches are known to 5e-4.
    assert_near(state[1:2], (var,), 1e-5)


@pytest.mark.parametrize(
    ("dtype", "kept", "tolerance"),
    [("bfloat16", "float32", 1e-6), ("complex64", "complex64", 1e-6)],
)
def test_population_dtypes_are_at_least_float32(rng, dtype, kept, tolerance):
    batches = [jnp.asarray(x, dtype) for x in draw(rng, (8, 5))]
    if dtype == "complex64":
        batches = [x + 1j * x[::-1] ** 2 for x in batches]
    state = jaxbn.population(batches)
    assert (state.mean.dtype, state.var.dtype) == (kept, "float32")
    assert_near(state[:2], oracle(batches, "paper"), tolerance)


@pytest.mark.usefixtures("x64")
def test_float64_batches_give_float64_statistics(rng):
    batches = [x.astype(np.float64) + 1e3 for x in draw(rng, (8, 5))]
    state = jaxbn.population([batches[0].astype(np.float32), *batches[1:]])
    assert (state.mean.dtype, state.var.dtype) == ("float64", "float64")
    state = jaxbn.population(batches, variance="total")
    assert_near(state[:2], oracle(batches, "total"), 1e-11)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_population_accepts_sharded_batches(rng, axis_type):
    mesh = Mesh(np.array(jax.devices()), "data", axis_types=(axis_type,))
    batches = draw(rng, (16, 16, 8))
    sharded = jax.device_put(batches, NamedSharding(mesh, P("data")))
    state = jaxbn.population(sharded, variance="total")
    assert_near(state[:2], oracle(batches, "total"), 1e-6)


def test_inference_with_population_standardizes_the_data(rng):
    batches = draw(rng)
    params, _ = jaxbn.init(C)
    state = jaxbn.population(batches, variance="total")
    y, _ = jaxbn.batch_norm(params, state, np.concatenate(batches), train=False)
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(y.var(0, ddof=1), 1, atol=2e-5)


def test_max_batches_bounds_reads_and_progress(rng):
    """No further batch is read, and a progress bar knows the number of batches."""
    batches, seen = draw(rng), []

    def progress(iterable):
        seen.append(len(iterable))
        return iterable

    stream = iter(batches * 2)
    state = jaxbn.population(stream, max_batches=2, progress=progress)
    assert_near(state[:2], oracle(batches[:2], "paper"), 1e-6)
    assert len(list(stream)) == 8
    for most in (3, 9):
        jaxbn.population(batches, max_batches=most, progress=progress)
    assert seen == [2, 3, 5]


def test_population_holds_one_batch_at_a_time(rng):
    """At most one earlier batch is alive when a batch is read."""
    import weakref

    alive = []

    def stream():
        for x in draw(rng, (4,) * 5):
            assert sum(ref() is not None for ref in alive) <= 1
            batch = jnp.array(x)
            alive.append(weakref.ref(batch))
            yield batch
            del batch

    jaxbn.population(stream())


# Every layer of a model.


def forward(params, x):
    """Return the inputs of both batch norms, which normalize by the batch."""
    seen = []
    for layer in ("first", "second"):
        dense, norm = params[f"{layer}_dense"], params[f"{layer}_norm"]
        x = x @ dense["kernel"] + dense["bias"]
        seen.append(x)
        x_hat = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
        x = np.tanh(x_hat * norm["scale"] + norm["bias"])
    return seen


def expected_stats(params, batches, variance):
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    seen = [forward(params, np.asarray(x, np.float64)) for x in batches]
    layers = zip(*seen, strict=True)
    return [oracle(inputs, variance) for inputs in layers]


class LinenMLP(linen.Module):
    norm: Any = linen.BatchNorm
    train: bool = False
    momentum: float = 0.9

    @linen.compact
    def __call__(self, x):
        for i, layer in enumerate(("first", "second")):
            x = linen.Dense(C + i, name=f"{layer}_dense")(x)
            norm = self.norm(momentum=self.momentum, name=f"{layer}_norm")
            x = linen.tanh(norm(x, use_running_average=not self.train))
        return x


class NNXMLP(nnx.Module):
    def __init__(self, norm: Any, train: bool = False, momentum: float = 0.9):
        rngs = nnx.Rngs(0)
        self.first_dense = nnx.Linear(C, C, rngs=rngs)
        self.first_norm = norm(C, momentum=momentum, rngs=rngs)
        self.second_dense = nnx.Linear(C, C + 1, rngs=rngs)
        self.second_norm = norm(C + 1, momentum=momentum, rngs=rngs)
        self.mode = not train

    def __call__(self, x):
        x = nnx.tanh(self.first_norm(self.first_dense(x), self.mode))
        return nnx.tanh(self.second_norm(self.second_dense(x), self.mode))


@cache
def linen_model(norm, **options) -> Any:
    model = LinenMLP(norm, **options)
    return model, variables_of(model, jnp.ones((2, C)))


def nnx_model(norm, **options) -> Any:
    model = NNXMLP(norm, **options)
    nnx.update(model, randomize(np.random.default_rng(1), nnx.state(model)))
    return model


def run_linen(norm, batches, options, **population) -> Any:
    model, variables = linen_model(norm, **options)
    new = jaxbn.linen.population(model, variables, batches, **population)
    assert_same(new["params"], variables["params"], 0)
    return new["params"], new["batch_stats"]


def run_nnx(norm, batches, options, **population) -> Any:
    model = nnx_model(norm, **options)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    before = nnx.graphdef(model)
    assert jaxbn.nnx.population(model, batches, **population) is None
    assert nnx.graphdef(model) == before
    assert_same(nnx.to_pure_dict(nnx.state(model, nnx.Param)), params, 0)
    return params, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))


MODELS = {
    "linen jaxbn": partial(run_linen, jaxbn.linen.BatchNorm),
    "linen Flax": partial(run_linen, linen.BatchNorm),
    "nnx jaxbn": partial(run_nnx, jaxbn.nnx.BatchNorm),
    "nnx Flax": partial(run_nnx, nnx.BatchNorm),
}

FLAX = [MODELS["linen Flax"], MODELS["nnx Flax"]]


def assert_model(result, batches, variance="paper", tolerance=1e-5):
    params, stats = result
    expected = expected_stats(params, batches, variance)
    for name, want in zip(("first_norm", "second_norm"), expected, strict=True):
        got = stats[name]
        assert set(got) == {"mean", "var"}
        assert (got["mean"].dtype, got["var"].dtype) == ("float32", "float32")
        assert_near((got["mean"], got["var"]), want, tolerance)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("name", MODELS)
def test_model_population_normalizes_each_batch_by_itself(rng, name, variance):
    """The mode, the momentum and the old statistics do not matter."""
    batches = draw(rng, (8, 8, 5))
    options = {"train": True, "momentum": 1.0} if "jaxbn" in name else {}
    result = MODELS[name](batches, options, variance=variance)
    assert_model(result, batches, variance)


@pytest.mark.parametrize("run", FLAX)
def test_model_population_is_accurate_at_a_large_mean(rng, run):
    """The pass computes the variance as jaxbn does; Flax's formula would cancel."""
    batches = draw(rng, (64, 64), loc=1e4)
    assert_model(run(batches, {}), batches, tolerance=1e-3)


@pytest.mark.parametrize("run", FLAX)
def test_model_population_accepts_sharded_batches(rng, run):
    batches = draw(rng, (16, 16))
    mesh = Mesh(np.array(jax.devices()), "data")
    sharded = jax.device_put(batches, NamedSharding(mesh, P("data")))
    assert_model(run(sharded, {}), batches)


@pytest.mark.parametrize("run", FLAX)
def test_model_population_applies_call_max_batches_and_progress(rng, run):
    """Batches may have any structure; each shape is compiled once for all calls."""
    batches, traced, bars = draw(rng, (8, 8, 8, 5)), [], []

    def call(model, batch):
        traced.append(batch["image"].shape)
        return model(batch["image"])

    def progress(iterable):
        bars.append(len(iterable))
        return iterable

    stream = [{"image": x, "label": np.arange(len(x))} for x in batches]
    assert_model(run(stream, {}, call=call), batches)
    options = {"call": call, "max_batches": 2, "progress": progress}
    assert_model(run(stream, {}, **options), batches[:2])
    assert traced == [(8, C), (5, C)]
    assert bars == [2]


class LinenOdd(linen.Module):
    """Call one layer twice, another in a subclass, and leave one unreached."""

    norm: Any

    def setup(self):
        class Doubled(self.norm):
            @linen.compact
            def __call__(self, x, use_running_average=None, *, mask=None):
                return 2 * super().__call__(x, use_running_average, mask=mask)

        self.twice = self.norm(use_running_average=True, axis_name="data")
        self.below = Doubled(use_running_average=True)
        self.after = self.norm(use_running_average=True)
        self.idle = self.norm(use_running_average=True)

    def __call__(self, x, mask, everything=False):
        y = self.twice(x, mask=mask)
        self.twice(3 * x)
        return self.after(self.below(y)) + (self.idle(x) if everything else 0)


class NNXOdd(nnx.Module):
    def __init__(self, norm):
        class Doubled(norm):
            def __call__(self, x, use_running_average=None, *, mask=None):
                return 2 * super().__call__(x, use_running_average, mask=mask)

        options = {"rngs": nnx.Rngs(0), "use_running_average": True}
        self.twice = self.again = norm(C, axis_name="data", **options)
        self.below = Doubled(C, **options)
        self.after = norm(C, **options)
        self.idle = norm(C, **options)

    def __call__(self, x, mask):
        y = self.twice(x, mask=mask)
        self.again(3 * x)
        return self.after(self.below(y))


def odd_linen(norm, batches):
    model = LinenOdd(norm)
    x, mask = batches[0]
    variables = variables_of(model, x, mask, everything=True)
    new = jaxbn.linen.population(
        model, variables, batches, call=lambda model, batch: model(*batch)
    )
    return variables["params"], variables["batch_stats"], new["batch_stats"]


def odd_nnx(norm, batches):
    model = NNXOdd(norm)
    nnx.update(model, randomize(np.random.default_rng(1), nnx.state(model)))

    def variables(kind):
        layers = {n: getattr(model, n) for n in ("twice", "below", "after", "idle")}
        return {n: nnx.to_pure_dict(nnx.state(m, kind)) for n, m in layers.items()}

    before = variables(nnx.BatchStat)
    jaxbn.nnx.population(model, batches, call=lambda model, batch: model(*batch))
    assert model.again is model.twice
    return variables(nnx.Param), before, variables(nnx.BatchStat)


@pytest.mark.parametrize(
    ("run", "norm"),
    [
        (odd_linen, linen.BatchNorm),
        (odd_linen, jaxbn.linen.BatchNorm),
        (odd_nnx, nnx.BatchNorm),
        (odd_nnx, jaxbn.nnx.BatchNorm),
    ],
)
def test_model_population_supports_shared_and_unreached_layers(rng, run, norm):
    """Each call counts as a batch, and axis names of the training step are ignored."""
    batches = draw(rng, (8, 8))
    masks = [rng.integers(0, 2, size=(len(x), 1)).astype(bool) for x in batches]
    params, before, new = run(norm, list(zip(batches, masks, strict=True)))
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)

    def apply(layer, x, kept):
        x_hat = (x - kept.mean(0)) / np.sqrt(kept.var(0) + 1e-5)
        return x_hat * params[layer]["scale"] + params[layer]["bias"]

    batches = [x.astype(np.float64) for x in batches]
    kept = [x[m[:, 0]] for x, m in zip(batches, masks, strict=True)]
    below = [apply("twice", x, rest) for x, rest in zip(batches, kept, strict=True)]
    inputs = {
        "twice": [*kept, *(3 * x for x in batches)],
        "below": below,
        "after": [2 * apply("below", x, x) for x in below],
    }
    for name, seen in inputs.items():
        got = new[name]
        assert_near((got["mean"], got["var"]), oracle(seen, "paper"), 1e-5)
    assert_same(new["idle"], before["idle"], 0)


@pytest.mark.parametrize("variance", VARIANCES)
def test_fully_masked_feature_keeps_its_statistics(rng, variance):
    mask, batches = np.array([True, False, True]), draw(rng, (8, 8))
    model = linen.BatchNorm(use_running_average=True)
    variables = variables_of(model, batches[0])
    new: Any = jaxbn.linen.population(
        model,
        variables,
        batches,
        variance=variance,
        call=lambda model, x: model(x, mask=mask),
    )
    old = variables["batch_stats"]
    for name, want in zip(("mean", "var"), oracle(batches, variance), strict=True):
        want = np.where(mask, want.real, old[name])
        np.testing.assert_allclose(new["batch_stats"][name], want, rtol=1e-5)


def test_model_population_sets_the_batch_count(rng):
    """Training with `momentum=None` can then continue the average."""
    batches = draw(rng, (8, 8, 8))
    model = jaxbn.linen.BatchNorm(momentum=None)
    variables = variables_of(model, batches[0], False)
    new = jaxbn.linen.population(model, variables, batches)
    assert_same(new["batch_stats"]["count"], jnp.float32(3), 0)
    layer = jaxbn.nnx.BatchNorm(C, momentum=None, rngs=nnx.Rngs(0))
    jaxbn.nnx.population(layer, batches)
    assert_same(layer.count[...], jnp.float32(3), 0)


@pytest.mark.parametrize("kind", [dict, FrozenDict])
def test_linen_population_keeps_containers_dtypes_and_shardings(rng, kind):
    batches = draw(rng, (8, 8))
    model = jaxbn.linen.BatchNorm(
        True, param_dtype=jnp.bfloat16, force_float32_reductions=False
    )
    mesh = Mesh(np.array(jax.devices()), "data")
    variables = variables_of(model, batches[0])
    variables = jax.device_put(variables, NamedSharding(mesh, P()))
    other = {"other": {"value": jnp.arange(3), "empty": {}}}
    variables = kind(variables | other)
    new = jaxbn.linen.population(model, variables, batches)
    chex.assert_trees_all_equal_structs(new, variables)
    assert new["params"]["scale"] is variables["params"]["scale"]
    assert new["other"]["value"] is variables["other"]["value"]
    for leaf in jax.tree.leaves(new["batch_stats"]):
        assert leaf.dtype == jnp.bfloat16
        assert leaf.sharding == NamedSharding(mesh, P())
    frozen = {**variables, "batch_stats": freeze(dict(variables["batch_stats"]))}
    new = jaxbn.linen.population(model, frozen, batches)
    chex.assert_trees_all_equal_structs(new, frozen)


# Transformations inside a model.


class Block(linen.Module):
    norm: Any

    @linen.compact
    def __call__(self, x, *_):
        self.sow("intermediates", "seen", x)
        y = linen.tanh(linen.Dense(C)(self.norm(use_running_average=True)(x)))
        return y, y.mean()


STACKED: dict[str, Any] = {
    "variable_axes": {"params": 0, "batch_stats": 0},
    "split_rngs": {"params": True},
}
SHARED: dict[str, Any] = {"split_rngs": {"params": False}}
LIFTS: dict[str, Any] = {
    "jit": linen.jit,
    "remat": linen.remat,
    "vmap": partial(linen.vmap, **STACKED),
    "vmap sync": partial(
        linen.vmap, variable_axes={"params": None, "batch_stats": None}, **SHARED,
        axis_name="batch",
    ),
    "scan layers": partial(linen.scan, **STACKED, length=3),
    "scan carry": partial(
        linen.scan, variable_broadcast="params", variable_carry="batch_stats",
        **SHARED, length=3,
    ),
}  # fmt: skip


def block_inputs(lift, variables, x) -> list[list[np.ndarray]]:
    """Return the inputs of one batch, as a list of calls for each set of statistics.

    Layers stacked along an axis have one set each; shared layers have one set in all.
    """
    as64 = partial(jax.tree.map, lambda p: np.asarray(p, np.float64))
    params, x = as64(variables["params"]), np.asarray(x, np.float64)

    def block(params, x):
        norm, dense = params["BatchNorm_0"], params["Dense_0"]
        axes = tuple(range(x.ndim - 1))
        x = (x - x.mean(axes)) / np.sqrt(x.var(axes) + 1e-5)
        x = x * norm["scale"] + norm["bias"]
        return np.tanh(x @ dense["kernel"] + dense["bias"])

    if lift == "vmap":
        return [[each] for each in x]
    if "scan" not in lift:
        return [[x]]
    seen = []
    for i in range(3):
        seen.append(x)
        stacked = lift == "scan layers"
        x = block(jax.tree.map(lambda p: p[i], params) if stacked else params, x)  # noqa: B023
    return [[x] for x in seen] if lift == "scan layers" else [seen]


NORMS = itertools.cycle((linen.BatchNorm, jaxbn.linen.BatchNorm))


@pytest.mark.parametrize(("lift", "norm"), list(zip(LIFTS, NORMS, strict=False)))
def test_linen_population_supports_lifted_transformations(lift, norm, rng):
    norm = partial(norm, axis_name="batch" if lift == "vmap sync" else "data")
    shape = (3, 8, C) if "vmap" in lift else (8, C)
    batches = [rng.normal(size=shape).astype(np.float32) for _ in range(2)]
    model = LIFTS[lift](Block)(norm)
    # A scan cannot initialize the variables that it carries.
    initialized = Block(norm) if lift == "scan carry" else model
    variables: Any = variables_of(initialized, batches[0])
    new: Any = jaxbn.linen.population(model, variables, batches)
    chex.assert_trees_all_equal_structs(new, variables)
    seen = [block_inputs(lift, variables, x) for x in batches]
    sets = [list(itertools.chain(*calls)) for calls in zip(*seen, strict=True)]
    expected = [
        np.stack(a) for a in zip(*(oracle(s, "paper") for s in sets), strict=True)
    ]
    (stats,) = new["batch_stats"].values()
    got = [np.reshape(stats[name], (-1, C)) for name in ("mean", "var")]
    assert_near(got, expected, 1e-5)


@linen.jit
class Compiled(linen.Module):
    """Compile the class once for all its instances."""

    @linen.compact
    def __call__(self, x):
        return linen.BatchNorm(use_running_average=False)(x)


def test_linen_population_retraces_compiled_classes(rng):
    (x,) = draw(rng, (8,))
    model = Compiled()
    variables = variables_of(model, x)
    step = partial(model.apply, mutable=["batch_stats"])
    before = step(variables, x)
    new: Any = jaxbn.linen.population(model, variables, [x])
    (stats,) = new["batch_stats"].values()
    assert_near((stats["mean"], stats["var"]), oracle([x], "paper"), 1e-5)
    assert_same(step(variables, x), before, 0)


def test_linen_population_works_inside_replace_batch_norm(rng):
    batches = draw(rng, (8, 8))
    with jaxbn.linen.replace_batch_norm():
        assert_model(run_linen(linen.BatchNorm, batches, {}), batches)


def test_linen_population_supports_unhashable_fields(rng):
    class Weighted(linen.Module):
        weights: Any

        @linen.compact
        def __call__(self, x):
            return linen.BatchNorm(use_running_average=True)(x * self.weights)

    batches = draw(rng, (8, 8))
    weights = rng.normal(size=(1, C)).astype(np.float32)
    model = Weighted(weights)
    variables = variables_of(model, batches[0])
    new = jaxbn.linen.population(model, variables, batches)
    stats = new["batch_stats"]["BatchNorm_0"]
    expected = oracle([x * weights for x in batches], "paper")
    assert_near((stats["mean"], stats["var"]), expected, 1e-5)


class Stack(nnx.Module):
    """Hold layers with stacked Variables, and scan or map over them."""

    def __init__(self, norm, lift):
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(key):
            return norm(C, rngs=nnx.Rngs(key), use_running_average=True)

        self.norm, self.lift = make(jax.random.split(jax.random.key(0), 3)), lift

    def __call__(self, x):
        if self.lift == "scan":
            axes = {"in_axes": (0, nnx.Carry), "out_axes": nnx.Carry}
            return nnx.scan(lambda norm, x: 2 * norm(x), **axes)(self.norm, x)
        axes = nnx.StateAxes({nnx.Param: 0, nnx.BatchStat: 0})
        run = nnx.vmap(lambda norm, x: norm(x), in_axes=(axes, None))
        return nnx.jit(run)(self.norm, x) if self.lift == "jit" else run(self.norm, x)


@pytest.mark.parametrize(
    ("lift", "norm"),
    [("scan", nnx.BatchNorm), ("vmap", jaxbn.nnx.BatchNorm), ("jit", nnx.BatchNorm)],
)
def test_nnx_population_supports_transformations(lift, norm, rng):
    batches, model = draw(rng, (8, 8)), Stack(norm, lift)
    jaxbn.nnx.population(model, batches)
    sets = [batches] * 3
    if lift == "scan":
        sets = []
        x = [np.asarray(b, np.float64) for b in batches]
        for _ in range(3):
            sets.append(x)
            x = [2 * (b - b.mean(0)) / np.sqrt(b.var(0) + 1e-5) for b in x]
    results = zip(*(oracle(s, "paper") for s in sets), strict=True)
    expected = tuple(np.stack(a) for a in results)
    assert_near((model.norm.mean[...], model.norm.var[...]), expected, 1e-5)


def test_nnx_population_keeps_lists_and_dropout_unchanged(rng):
    batches = draw(rng, (8, 8))
    norm = nnx.BatchNorm(C, rngs=nnx.Rngs(0))
    models = [norm, nnx.Dropout(0.5, rngs=nnx.Rngs(1)), norm]
    jaxbn.nnx.population(models, batches, call=lambda m, x: m[1](m[0](x)))
    assert_near((norm.mean[...], norm.var[...]), oracle(batches, "paper"), 1e-5)
    assert models[1].rngs.count[...] == 0


@pytest.mark.usefixtures("x64")
def test_float64_batches_keep_the_dtype_of_linen_statistics(rng):
    """A scan that carries the statistics needs them to keep their dtypes."""
    batches = draw(rng, (8, 8), dtype=np.float64)
    model = LIFTS["scan carry"](Block)(linen.BatchNorm)
    variables = variables_of(Block(linen.BatchNorm), batches[0])
    new: Any = jaxbn.linen.population(model, variables, batches)
    assert {a.dtype for a in jax.tree.leaves(new)} == {jnp.dtype("float32")}


def test_model_population_supports_complex_batches(rng):
    batches = [x + 1j * x[::-1] ** 2 for x in draw(rng, (8, 8))]
    expected = oracle(batches, "total")
    model = jaxbn.linen.BatchNorm(True)
    variables = variables_of(model, batches[0])
    new = jaxbn.linen.population(model, variables, batches, variance="total")
    stats = new["batch_stats"]
    assert (stats["mean"].dtype, stats["var"].dtype) == ("complex64", "float32")
    assert_near((stats["mean"], stats["var"]), expected, 1e-5)
    layer = jaxbn.nnx.BatchNorm(C, rngs=nnx.Rngs(0))
    jaxbn.nnx.population(layer, batches, variance="total")
    assert_near((layer.mean[...], layer.var[...]), expected, 1e-5)


def test_linen_population_of_averaged_weights_matches_oracle(rng):
    """The weights are an exponential moving average by optax."""
    batches = draw(rng, (8, 8, 5))
    model, variables = linen_model(linen.BatchNorm)
    average = optax.ema(0.5)
    trained = [randomize(rng, variables["params"]) for _ in range(3)]
    params, state = trained[0], average.init(trained[0])
    for params in trained:
        params, state = average.update(params, state)
    averaged = {**variables, "params": params}
    new: Any = jaxbn.linen.population(model, averaged, batches)
    assert_model((new["params"], new["batch_stats"]), batches)
    y, stale = (jax.jit(model.apply)(v, batches[0]) for v in (new, averaged))
    assert float(abs(y - stale).max()) > 0.1


# Errors leave the model unchanged.


X = np.arange(24, dtype=np.float32).reshape(8, C)
MORE = np.ones((4, C + 1), np.float32)
NAN = np.where(X == 5, np.nan, X)
BATCHES: dict[str, Any] = {
    "none": ([], {}, ValueError, "at least one batch; got none.*generator"),
    "no numbers": (
        [X, np.array(["a"])], {}, TypeError, "that JAX knows; got ndarray of <U1",
    ),
    "objects": ([X, np.array([None])], {}, TypeError, "got ndarray of object"),
    "strings": ([X, "file.npy"], {}, TypeError, "got str of no dtype"),
    "one row each": (
        [X[:1], X[1:2]], {}, ValueError,
        "'paper' needs more than one element of a feature in one batch; 3 of 3 "
        "features of .* have none such.*, or 'total'",
    ),
    "one row": (
        [X[:1]], {"variance": "total"}, ValueError,
        r"'total' needs more than one element of a feature in all .*larger batches\.",
    ),
    "nan": (
        [X, NAN, "unread"], {}, ValueError,
        r"(?s)finite; got inf or NaN in batch 1, for .* \(1 of 3 features\).*"
        "skip_nonfinite=True.*In batch 1 of population; the first is batch 0",
    ),
    "each nan": (
        [NAN, NAN], {"skip_nonfinite": True}, ValueError,
        "at least one finite batch; got inf or NaN in each of 2",
    ),
    "variance": ([X], {"variance": "unbiased"}, ValueError, r"one of \('paper', 'tot"),
    "bound": ([X], {"max_batches": 0}, ValueError, "at least 1; got 0"),
    "bound kind": ([X], {"max_batches": 1.5}, TypeError, "an int, or None.*got 1.5"),
}  # fmt: skip


def refuse_core(batches, options, error, match):
    with pytest.raises(error, match=match):
        jaxbn.population(iter(batches), **options)


def refuse_linen(batches, options, error, match):
    model = linen.BatchNorm(use_running_average=True)
    variables = variables_of(model, X)
    before = jax.tree.map(np.array, variables)
    with pytest.raises(error, match=match):
        jaxbn.linen.population(model, variables, iter(batches), **options)
    assert_same(variables, before, 0)


def refuse_nnx(batches, options, error, match):
    model = nnx.BatchNorm(C, rngs=nnx.Rngs(0))
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model)))
    with pytest.raises(error, match=match):
        jaxbn.nnx.population(model, iter(batches), **options)
    assert type(model) is nnx.BatchNorm
    assert_same(nnx.to_pure_dict(nnx.state(model)), before, 0)


@pytest.mark.parametrize("refuse", [refuse_core, refuse_linen, refuse_nnx])
@pytest.mark.parametrize("case", BATCHES)
@pytest.mark.usefixtures("unchecked_types")
def test_population_rejects_bad_input_and_keeps_the_model(refuse, case):
    refuse(*BATCHES[case])


@pytest.mark.parametrize("refuse", [refuse_core, refuse_linen, refuse_nnx])
def test_population_rejects_batches_with_other_features(refuse):
    message = r"same features, here \(3,\); got a batch with \(4,\)\. Pass axis="
    refuse([X, MORE], {}, ValueError, message)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("batch", [(X, X, X), [X, X, X], [X]], ids=len)
def test_population_rejects_tuples_and_lists_that_are_no_pair(batch):
    message = rf"x or a pair \(x, mask\); got {len(batch)} of them"
    refuse_core([batch], {}, ValueError, message)


def test_population_rejects_integers_and_empty_features():
    refuse_core(
        [X.astype(int)], {}, TypeError, r"x must be floating or complex.*; got int"
    )
    mask = np.array([True, False, True])
    message = "every feature needs an unmasked element in some batch; 1 of 3 have none"
    refuse_core([(X, mask)], {}, ValueError, message)
    refuse_core([X[:0]], {}, ValueError, "3 of 3 have none")


def test_population_error_names_the_batch_and_the_layers(rng):
    match = r"in batch 1, for 'first_norm' \(3 of 3 .*'second_norm' \(4 of 4 features"
    model, variables = linen_model(linen.BatchNorm)
    with pytest.raises(ValueError, match=match):
        jaxbn.linen.population(model, variables, [X, NAN])
    model = nnx_model(nnx.BatchNorm)
    before = nnx.to_pure_dict(nnx.state(model))
    with pytest.raises(ValueError, match=match):
        jaxbn.nnx.population(model, [X, NAN])
    assert_same(nnx.to_pure_dict(nnx.state(model)), before, 0)


def test_population_rejects_models_without_batch_norm():
    with pytest.raises(ValueError, match="batch_stats of a batch norm layer; got none"):
        jaxbn.linen.population(linen.Dense(2), {"params": {}}, [X])
    with pytest.raises(ValueError, match="a model with a batch norm layer; got none"):
        jaxbn.nnx.population(nnx.Linear(C, 2, rngs=nnx.Rngs(0)), [X])


def test_population_rejects_models_with_only_unreached_layers():
    match = "a batch norm layer that the batches reach; got none"
    model = linen.BatchNorm(use_running_average=True)
    variables = variables_of(model, X)
    with pytest.raises(ValueError, match=match):
        jaxbn.linen.population(model, variables, [X], call=lambda model, x: x)
    layer = nnx.BatchNorm(C, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=match):
        jaxbn.nnx.population(layer, [X], call=lambda model, x: x)


def test_errors_of_batches_and_model_propagate():
    def stream():
        yield X
        raise KeyError("broken file")

    refuse_nnx(stream(), {}, KeyError, "broken file")
    refuse_linen(stream(), {}, KeyError, "broken file")
    options = {"call": lambda model, x: model(x[0])}
    refuse_nnx([MORE], options, (ValueError, TypeError), "4")
