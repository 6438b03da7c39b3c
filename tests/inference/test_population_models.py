"""Test population statistics in models that others wrote."""

from collections import namedtuple
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from flax.errors import ScopeParamShapeError
from flax_helpers import assert_same, randomize
from helpers import assert_near

import jaxbn
import jaxbn.linen
import jaxbn.nnx

pytestmark = pytest.mark.usefixtures("standard_promotion")
C = 3


@pytest.fixture
def batches(rng) -> list[np.ndarray]:
    return [
        (rng.normal(size=C) + 1.9 * rng.normal(size=(8, C))).astype(np.float32)
        for _ in range(3)
    ]


def expected(batches):
    """Return the paper's statistics of equal batches."""
    x = np.stack(batches).astype(np.float64)
    n = x.shape[1]
    return x.mean((0, 1)), n / (n - 1) * x.var(1).mean(0)


def normalize(x, params, mean, var):
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    mean, var = np.asarray(mean, np.float64), np.asarray(var, np.float64)
    return (x - mean) / np.sqrt(var + 1e-5) * params["scale"] + params["bias"]


def random_variables(model, x) -> Any:
    init = partial(model.init, jax.random.key(0))
    return randomize(np.random.default_rng(1), jax.eval_shape(init, x))


def random_model(model) -> Any:
    nnx.update(model, randomize(np.random.default_rng(1), nnx.state(model)))
    return model


# Attributes of any kind.


class Configured(nnx.Module):
    def __init__(self, config, factor=2.0):
        self.config, self.factor = config, factor
        self.bn = nnx.BatchNorm(C, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.bn(self.factor * x)


@pytest.mark.parametrize(
    "config",
    [
        {"width": 4},
        [1, 2],
        {"depths": [1, {"widths": (2, 3)}]},
        {"a"},
        np.arange(3.0),
        nnx.Dict(width=4),
        nnx.List([1, 2]),
        nnx.Dict(depths=[1]),
    ],
    ids=lambda config: repr(config)[:20],
)
def test_nnx_population_supports_any_attribute(config, batches):
    """All batches of a shape are compiled once, in later calls too."""
    traced = []

    def call(model, x):
        traced.append(x.shape)
        return model(x)

    for _ in range(2):
        model = Configured(config)
        jaxbn.nnx.population(model, batches, call=call)
        stats = model.bn.mean[...], model.bn.var[...]
        assert_near(stats, expected([2 * x for x in batches]))
    assert traced == [(8, C)]


def test_nnx_population_compiles_again_for_other_attributes(batches):
    for factor in (2.0, 3.0):
        model = Configured({"factor": [factor]}, factor)
        jaxbn.nnx.population(model, batches)
        assert_near(model.bn.mean[...], expected(batches)[0] * factor)


# Some of the layers.


class LinenNet(linen.Module):
    """Call a frozen layer, and two in training mode that the step synchronizes."""

    norm: Any = linen.BatchNorm

    @linen.compact
    def __call__(self, x):
        x = self.norm(use_running_average=True, name="frozen")(x)
        x = self.norm(use_running_average=False, axis_name="data", name="trained")(x)
        return self.norm(use_running_average=False, name="head")(x)


class NNXNet(nnx.Module):
    def __init__(self, norm: Any, axis_name: str | None = "data", rngs: Any = None):
        rngs = rngs or nnx.Rngs(0)
        self.blocks = nnx.List([norm(C, use_running_average=True, rngs=rngs)])
        self.trained = norm(C, axis_name=axis_name, rngs=rngs)
        self.head = norm(C, rngs=rngs)

    def __call__(self, x):
        return self.head(self.trained(self.blocks[0](x)))


def run_linen(norm, batches, **options) -> Any:
    model = LinenNet(norm)
    variables = random_variables(model, batches[0])
    new: Any = jaxbn.linen.population(model, variables, batches, **options)
    return variables["params"], variables["batch_stats"], new["batch_stats"]


def run_nnx(norm, batches, **options) -> Any:
    model = random_model(NNXNet(norm))

    def named(kind):
        layers = {"frozen": model.blocks[0]}
        layers |= {"trained": model.trained, "head": model.head}
        return {n: nnx.to_pure_dict(nnx.state(m, kind)) for n, m in layers.items()}

    params, before = named(nnx.Param), named(nnx.BatchStat)
    jaxbn.nnx.population(model, batches, **options)
    return params, before, named(nnx.BatchStat)


RUNS = [
    (run_linen, linen.BatchNorm, "frozen"),
    (run_linen, jaxbn.linen.BatchNorm, "frozen"),
    (run_nnx, nnx.BatchNorm, "blocks/0"),
    (run_nnx, jaxbn.nnx.BatchNorm, "blocks/0"),
]


def inputs_of_layers(batches, params, stats, frozen: bool):
    """Return the inputs of the three layers by name, in float64."""
    inputs: dict[str, Any] = {"frozen": [], "trained": [], "head": []}
    for x in batches:
        x = x.astype(np.float64)
        inputs["frozen"].append(x)
        running = stats["frozen"]["mean"], stats["frozen"]["var"]
        batch = x.mean(0), x.var(0)
        x = normalize(x, params["frozen"], *(running if frozen else batch))
        inputs["trained"].append(x)
        inputs["head"].append(normalize(x, params["trained"], x.mean(0), x.var(0)))
    return inputs


@pytest.mark.parametrize(("run", "norm", "frozen"), RUNS)
def test_layers_left_out_are_called_as_in_the_model(run, norm, frozen, batches):
    """They keep their statistics; a frozen one normalizes by them."""
    params, old, new = run(norm, batches, layers=lambda path: path == "head")
    assert_same(new["frozen"], old["frozen"], 0)
    assert_same(new["trained"], old["trained"], 0)
    inputs = inputs_of_layers(batches, params, old, frozen=True)["head"]
    assert_near((new["head"]["mean"], new["head"]["var"]), expected(inputs))


@pytest.mark.parametrize(("run", "norm", "frozen"), RUNS)
def test_all_layers_but_a_frozen_one(run, norm, frozen, batches):
    params, old, new = run(norm, batches, layers=lambda path: path != frozen)
    assert_same(new["frozen"], old["frozen"], 0)
    inputs = inputs_of_layers(batches, params, old, frozen=True)
    for name in ("trained", "head"):
        assert_near((new[name]["mean"], new[name]["var"]), expected(inputs[name]))


@pytest.mark.parametrize(("run", "norm", "frozen"), RUNS[::2])
def test_a_frozen_layer_is_recomputed_unless_left_out(run, norm, frozen, batches):
    params, old, new = run(norm, batches)
    inputs = inputs_of_layers(batches, params, old, frozen=False)
    for name, seen in inputs.items():
        assert_near((new[name]["mean"], new[name]["var"]), expected(seen))


def test_layers_selects_within_bridges(batches):
    bridge = nnx.bridge.ToNNX(LinenNet(), rngs=nnx.Rngs(0))
    model: Any = {"inner": nnx.bridge.lazy_init(bridge, batches[0])}
    params = {n: {"scale": np.ones(C), "bias": np.zeros(C)} for n in LAYERS}
    initial = {n: {"mean": np.zeros(C), "var": np.ones(C)} for n in LAYERS}
    want = expected(inputs_of_layers(batches, params, initial, frozen=True)["trained"])
    jaxbn.nnx.population(
        model,
        batches,
        call=lambda model, x: model["inner"](x),
        layers=lambda path: path == "inner/trained",
    )
    stats = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))["inner"]
    assert_near((stats["trained"]["mean"], stats["trained"]["var"]), want)
    assert_near(stats["frozen"], initial["frozen"], 0)
    assert_near(stats["head"], initial["head"], 0)

    bridged = nnx.bridge.to_linen(NNXNet, nnx.BatchNorm, axis_name=None)
    variables = bridged.init(jax.random.key(0), batches[0])
    new: Any = jaxbn.linen.population(
        bridged, variables, batches, layers=lambda path: path == "trained"
    )
    stats, old = new["batch_stats"], variables["batch_stats"]
    jax.tree.map(np.testing.assert_array_equal, stats["blocks"], old["blocks"])
    jax.tree.map(np.testing.assert_array_equal, stats["head"], old["head"])
    got = jax.tree.leaves(stats["trained"])
    assert_near(tuple(got), want)


LAYERS = ("frozen", "trained", "head")


@pytest.mark.parametrize(("run", "norm", "frozen"), RUNS[::2])
def test_layers_must_select_a_layer(run, norm, frozen, batches):
    paths = f"There are: '{frozen}', 'head', 'trained'"
    if run is run_nnx:
        paths = "There are: 'blocks/0', 'head', 'trained'"
    with pytest.raises(ValueError, match=f"a function that selects none. {paths}"):
        run(norm, batches, layers=lambda path: path == "BatchNorm_7")


@pytest.mark.parametrize(("run", "norm", "frozen"), RUNS[::2])
@pytest.mark.usefixtures("unchecked_types")
def test_layers_must_be_a_function(run, norm, frozen, batches):
    match = "must be a function of a layer's path; got 'head'.* There are: .*'head'"
    with pytest.raises(TypeError, match=match):
        run(norm, batches, layers="head")


# Models stacked over seeds.


class LinenSmall(linen.Module):
    @linen.compact
    def __call__(self, x, train=True):
        x = linen.Dense(C)(x)
        x = linen.BatchNorm(use_running_average=not train)(x)
        return linen.BatchNorm(use_running_average=True)(linen.tanh(x))


class NNXSmall(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(C, C, rngs=rngs)
        self.first = nnx.BatchNorm(C, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
        self.second = nnx.BatchNorm(C, use_running_average=True, rngs=rngs)

    def __call__(self, x):
        return self.second(self.dropout(nnx.tanh(self.first(self.dense(x)))))


@pytest.mark.parametrize("seeds", [2, C])
@pytest.mark.parametrize("layers", [None, lambda path: path.endswith("_1")])
def test_linen_population_of_each_seed(seeds, layers, batches):
    model = LinenSmall()
    keys = jax.random.split(jax.random.key(0), seeds)
    variables = jax.vmap(model.init, (0, None))(keys, batches[0])
    new = jaxbn.linen.population(model, variables, batches, layers=layers)
    for seed in range(seeds):
        one = jax.tree.map(lambda a, seed=seed: a[seed], (variables, new))
        alone = jaxbn.linen.population(model, one[0], batches, layers=layers)
        assert_same(one[1], alone, 1e-6)


@pytest.mark.parametrize("seeds", [2, C])
@pytest.mark.parametrize("layers", [None, lambda path: path == "second"])
def test_nnx_population_of_each_seed(seeds, layers, batches):
    keys = jax.random.split(jax.random.key(0), seeds)
    stacked = nnx.vmap(lambda key: NNXSmall(nnx.Rngs(key)))(keys)
    jaxbn.nnx.population(stacked, batches, layers=layers)
    for seed in range(seeds):
        model = NNXSmall(nnx.Rngs(keys[seed]))
        jaxbn.nnx.population(model, batches, layers=layers)
        alone = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
        got = nnx.to_pure_dict(nnx.state(stacked, nnx.BatchStat))
        assert_same(jax.tree.map(lambda a, s=seed: a[s], got), alone, 1e-6)


def test_an_error_of_a_stack_is_the_error_of_its_model(batches):
    model = LinenSmall()
    keys = jax.random.split(jax.random.key(0), 2)
    variables = jax.vmap(model.init, (0, None))(keys, batches[0])
    wide = [np.ones((8, C + 1), np.float32)]
    with pytest.raises(ScopeParamShapeError, match=r"\(2, 3, 3\)"):  # stacked kernels
        jaxbn.linen.population(model, variables, wide)


# A batch instead of batches, and models with more arguments.


Pair = namedtuple("Pair", "image label")
X = np.ones((8, C), np.float32)
SINGLE = {
    "numpy": (X, r"ndarray of shape \(8, 3\)"),
    "jax": (jnp.ones((8, C)), r"ArrayImpl of shape \(8, 3\)"),
    "scalar": (np.float32(1), r"float32 of shape \(\)"),
    "dict": ({"image": X}, "dict"),
    "named tuple": (Pair(X, X), "Pair"),
    "number": (3.0, "float"),
}


def populate_core(batches):
    jaxbn.population(batches)


def populate_linen(batches):
    model = linen.BatchNorm(use_running_average=True)
    jaxbn.linen.population(model, random_variables(model, X), batches)


def populate_nnx(batches):
    jaxbn.nnx.population(nnx.BatchNorm(C, rngs=nnx.Rngs(0)), batches)


@pytest.mark.parametrize("populate", [populate_core, populate_linen, populate_nnx])
@pytest.mark.parametrize("kind", SINGLE)
@pytest.mark.usefixtures("unchecked_types")
def test_one_batch_is_no_iterable_of_batches(populate, kind):
    batch, got = SINGLE[kind]
    match = rf"must be an iterable of batches; got {got}, which.*Write \[images\]"
    with pytest.raises(TypeError, match=match):
        populate(batch)


class LinenTrain(linen.Module):
    @linen.compact
    def __call__(self, x, train):
        return linen.BatchNorm(use_running_average=not train)(x)


class NNXTrain(nnx.Module):
    def __init__(self):
        self.bn = nnx.BatchNorm(C, rngs=nnx.Rngs(0))

    def __call__(self, x, train):
        return self.bn(x, use_running_average=not train)


def test_errors_of_the_call_suggest_call(batches):
    """pytest matches notes too."""
    linen_model, nnx_model = LinenTrain(), NNXTrain()
    variables = linen_model.init(jax.random.key(0), X, False)
    match = r"(?s)train.*called the model as model\(batch\).*call=lambda model, batch"
    with pytest.raises(TypeError, match=match):
        jaxbn.linen.population(linen_model, variables, batches)
    with pytest.raises(TypeError, match=match):
        jaxbn.nnx.population(nnx_model, batches)
    dicts = [{"image": x} for x in batches]
    with pytest.raises(Exception, match=match.replace("train.*", "", 1)):
        jaxbn.nnx.population(nnx.BatchNorm(C, rngs=nnx.Rngs(0)), dicts)


def test_errors_of_a_given_call_stay_as_they_are(batches):
    def call(model, x):
        raise KeyError("label")

    with pytest.raises(KeyError) as error:
        jaxbn.nnx.population(NNXTrain(), batches, call=call)
    notes = getattr(error.value, "__notes__", [])
    assert not [note for note in notes if "call=" in note]
