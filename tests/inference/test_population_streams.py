"""Test population statistics of models that draw random numbers."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from flax.core import freeze
from flax.errors import InvalidRngError, TraceContextError
from helpers import assert_near
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn.nnx import _population as nnx_population

pytestmark = pytest.mark.usefixtures("standard_promotion")
C = 3
SIZES = (8, 8, 5, 3)
KEY = jax.random.key(7)


@pytest.fixture
def batches(rng) -> list[np.ndarray]:
    return [(1.9 * rng.normal(size=(n, C))).astype(np.float32) for n in SIZES]


def expected(batches, keys):
    """Return the paper's statistics of x + N(0, 1), with one key for each batch."""
    noisy = [
        np.asarray(x, np.float64) + np.asarray(jax.random.normal(key, x.shape))
        for x, key in zip(batches, keys, strict=True)
    ]
    n = np.array([len(x) for x in noisy])
    mean = np.concatenate(noisy).mean(0)
    return mean, np.average([x.var(0, ddof=1) for x in noisy], axis=0, weights=n)


def keys_of_batches(key=KEY, first=0, step=1) -> list[Any]:
    """Fold the number of each batch, or the draws before it, into the key."""
    return [jax.random.fold_in(key, first + step * i) for i in range(len(SIZES))]


# nnx: the streams of the model.


class Noisy(nnx.Module):
    """Add noise to x, from one stream, and count the calls."""

    def __init__(self, rngs, stream="default"):
        self.rngs, self.stream = rngs, stream
        self.calls = nnx.Variable(jnp.zeros(()))
        self.bn = nnx.BatchNorm(C, rngs=nnx.Rngs(0))

    def __call__(self, x):
        x = x + self.calls[...]  # 0 in each batch: only streams advance
        self.calls[...] += 1
        return self.bn(x + jax.random.normal(self.rngs[self.stream](), x.shape))


def statistics(bn) -> tuple[Any, Any]:
    return bn.mean[...], bn.var[...]


def counts(model) -> list[Any]:
    nodes = [node for _, node in nnx.iter_graph(model, graph=True)]
    return [node[...].tolist() for node in nodes if isinstance(node, nnx.RngCount)]


@pytest.mark.parametrize("stream", ["default", "noise"])
def test_each_batch_draws_the_next_numbers_of_a_stream(stream, batches):
    """They are those of training, and the model's streams stay as they are."""
    rngs = nnx.Rngs(**{stream: KEY}, other=1)
    rngs[stream]()
    model, traced = {"nets": [Noisy(rngs, stream)]}, []

    def call(model, x):
        traced.append(x.shape)
        return model["nets"][0](x)

    for _ in range(2):
        jaxbn.nnx.population(model, batches, call=call)
        (net,) = model["nets"]
        want = expected(batches, keys_of_batches(first=1))
        assert_near(statistics(net.bn), want)
        assert (rngs[stream].count[...], net.calls[...]) == (1, 0)
        assert net.rngs is rngs
    assert traced == [(8, C), (5, C), (3, C)]


def test_modules_that_share_a_stream_draw_in_turn(batches):
    rngs = nnx.Rngs(KEY)
    model = [Noisy(rngs), Noisy(rngs)]
    jaxbn.nnx.population(model, batches, call=lambda nets, x: [net(x) for net in nets])
    for first, net in enumerate(model):
        want = expected(batches, keys_of_batches(first=first, step=2))
        assert_near(statistics(net.bn), want)


def test_models_stacked_over_seeds_have_streams_of_their_own(batches):
    keys = jax.random.split(KEY, 2)
    stack = nnx.vmap(lambda key: Noisy(nnx.Rngs(key)))(keys)
    jaxbn.nnx.population(stack, batches)
    for seed, key in enumerate(keys):
        got = tuple(a[seed] for a in statistics(stack.bn))
        assert_near(got, expected(batches, keys_of_batches(key)))
    assert counts(stack) == [[0, 0]]


def test_streams_may_go_beside_the_model(batches):
    class Inner(nnx.Module):
        def __init__(self):
            self.bn = nnx.BatchNorm(C, rngs=nnx.Rngs(0))

        def __call__(self, x, rngs):
            return self.bn(x + jax.random.normal(rngs(), x.shape))

    net, rngs = Inner(), nnx.Rngs(KEY)
    call = nnx.jit(lambda model, x: model[0](x, model[1]))
    jaxbn.nnx.population([net, rngs], batches, call=call)
    assert_near(statistics(net.bn), expected(batches, keys_of_batches()))
    assert counts(rngs) == [0]
    match = r"Random streams must be part of the model.*population\(\[model, rngs\]"
    with pytest.raises(TraceContextError, match=match):
        jaxbn.nnx.population(net, batches, call=lambda model, x: model(x, rngs))
    with pytest.raises(TypeError, match="(?s)rngs.*" + match):
        jaxbn.nnx.population(net, batches)


def test_streams_and_statistics_stay_as_they_are_after_an_error(batches):
    model = Noisy(nnx.Rngs(KEY))
    before = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    with pytest.raises(ValueError, match="in batch 4"):
        jaxbn.nnx.population(model, [*batches, np.full_like(batches[0], np.nan)])
    after = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    assert counts(model) == [0]


def test_a_skipped_batch_draws_too(batches):
    """The numbers of a batch depend on its place in the stream alone."""
    model = Noisy(nnx.Rngs(KEY))
    broken = [batches[0], np.full_like(batches[1], np.nan), *batches[2:]]
    with pytest.warns(UserWarning, match="number from 0: 1"):
        jaxbn.nnx.population(model, broken, skip_nonfinite=True)
    left, keys = list(zip(batches, keys_of_batches(), strict=True)), []
    del left[1]
    batches, keys = zip(*left, strict=True)
    assert_near(statistics(model.bn), expected(batches, keys))


def test_streams_of_sharded_batches_are_compiled_once(batches):
    mesh = Mesh(np.array(jax.devices()), "data")
    sharded = jax.device_put(batches[:2], NamedSharding(mesh, P("data")))
    model = Noisy(nnx.Rngs(KEY))
    measure: Any = nnx_population._measure
    before = measure._cache_size()
    jaxbn.nnx.population(model, sharded * 2)
    assert measure._cache_size() == before + 1
    jaxbn.nnx.population(model, sharded)
    assert_near(statistics(model.bn), expected(batches[:2], keys_of_batches()[:2]))


# linen: `rngs`.


class LinenNoisy(linen.Module):
    def setup(self):
        self.bn = linen.BatchNorm(use_running_average=True)

    def __call__(self, x):
        return self.bn(self.add_noise(x))

    def add_noise(self, x):
        return x + jax.random.normal(self.make_rng("noise"), x.shape)


def linen_variables() -> Any:
    layer = {"mean": jnp.zeros(C), "var": jnp.ones(C)}
    params = {"scale": jnp.ones(C), "bias": jnp.zeros(C)}
    return {"params": {"bn": params}, "batch_stats": {"bn": layer}}


def linen_expected(batches, rngs):
    """Return the statistics of the numbers that `apply` draws with these streams."""
    model = LinenNoisy()
    noisy = [
        np.asarray(model.apply({}, x, rngs=r, method="add_noise"), np.float64)
        for x, r in zip(batches, rngs, strict=True)
    ]
    n = np.array([len(x) for x in noisy])
    mean = np.concatenate(noisy).mean(0)
    return mean, np.average([x.var(0, ddof=1) for x in noisy], axis=0, weights=n)


RNGS = {
    "key": KEY,
    "old key": jax.random.PRNGKey(7),
    "NumPy key": np.asarray(jax.random.PRNGKey(7)),
    "dict": {"noise": KEY, "dropout": jax.random.key(1)},
    "frozen": freeze({"noise": KEY}),
}


@pytest.mark.parametrize("kind", RNGS)
def test_rngs_are_folded_in_by_the_number_of_the_batch(kind, batches):
    rngs = RNGS[kind]
    folded = keys_of_batches(rngs["noise"] if kind in ("dict", "frozen") else rngs)
    run = partial(jaxbn.linen.population, LinenNoisy(), linen_variables())
    got: Any = run(batches, rngs=rngs)["batch_stats"]["bn"]
    want = linen_expected(batches, [{"noise": key} for key in folded])
    if kind in ("key", "old key", "NumPy key"):
        want = linen_expected(batches, [{"params": key} for key in folded])
    assert_near((got["mean"], got["var"]), want)


def test_rngs_are_compiled_once_and_work_with_call_and_max_batches(batches):
    traced = []

    def call(model, batch):
        traced.append(batch["x"].shape)
        return model(batch["x"])

    run = partial(jaxbn.linen.population, LinenNoisy(), linen_variables())
    for seed in range(2):
        stream = ({"x": x} for x in batches)
        key = jax.random.key(seed)
        new: Any = run(stream, rngs={"noise": key}, call=call, max_batches=3)
        got = new["batch_stats"]["bn"]
        folded = [{"noise": k} for k in keys_of_batches(key)[:3]]
        assert_near((got["mean"], got["var"]), linen_expected(batches[:3], folded))
    assert traced == [(8, C), (5, C)]


def test_seeds_of_a_stack_share_the_streams(batches):
    variables = linen_variables()
    stack = jax.tree.map(lambda a: jnp.stack([a, 2 + a]), variables)
    run = partial(jaxbn.linen.population, LinenNoisy(), rngs={"noise": KEY})
    got: Any = run(stack, batches)["batch_stats"]
    want: Any = run(variables, batches)["batch_stats"]
    for seed in range(2):
        assert_near(jax.tree.map(lambda a, s=seed: a[s], got), want, 1e-6)


@pytest.mark.parametrize("rngs", [None, {"default": KEY}, KEY])
def test_nnx_modules_in_linen_models_draw_new_numbers_in_each_batch(rngs, batches):
    """Without streams Flax gives them seed 0, in each batch anew."""
    seen = []

    class Recording(Noisy):
        def __call__(self, x):
            key = self.rngs.default.key[...]
            jax.debug.callback(lambda key: seen.append(key), jax.random.key_data(key))
            return super().__call__(x)

    model = nnx.bridge.ToLinen(Recording, args=())
    variables = model.init({"params": KEY, "default": KEY}, batches[0])
    base = jax.random.key(0) if rngs is None else KEY
    jax.effects_barrier()
    seen.clear()
    for x, key in zip(batches, keys_of_batches(base), strict=True):
        model.apply(variables, x, rngs={"default": key}, mutable=True)
    jax.effects_barrier()
    want = [jax.random.wrap_key_data(jnp.asarray(key)) for key in seen]
    want = [jax.random.fold_in(key, 0) for key in want]
    new: Any = jaxbn.linen.population(model, variables, batches, rngs=rngs)
    got = new["batch_stats"]["bn"]
    assert_near((got["mean"], got["var"]), expected(batches, want))


def test_linen_modules_in_nnx_models_draw_new_numbers_in_each_batch(batches):
    rngs = nnx.Rngs(params=0, noise=7)
    bridge = nnx.bridge.ToNNX(LinenNoisy(), rngs=rngs)
    model: Any = nnx.bridge.lazy_init(bridge, batches[0])
    stream: Any = model.to_nnx__rngs["noise"]
    start = int(stream.count[...])
    keys = keys_of_batches(stream.key[...], start)
    jaxbn.nnx.population(model, batches)
    got = model.bn["mean"][...], model.bn["var"][...]
    assert_near(got, linen_expected(batches, [{"noise": key} for key in keys]))
    assert stream.count[...] == start


def test_a_model_that_samples_asks_for_rngs(batches):
    run = partial(jaxbn.linen.population, LinenNoisy(), linen_variables(), batches)
    match = r'(?s)"noise".*draws random numbers: pass population a key .* rngs={'
    for call in (None, lambda model, x: model(x)):
        with pytest.raises(InvalidRngError, match=match):
            run(call=call)
    with pytest.raises(InvalidRngError, match=match):
        run(rngs={"dropout": KEY})


@pytest.mark.parametrize(
    "rngs",
    [0, {"noise": 0}, nnx.Rngs(0), jax.random.split(KEY), "noise", [KEY]],
    ids=lambda rngs: type(rngs).__name__,
)
@pytest.mark.usefixtures("unchecked_types")
def test_rngs_must_be_keys(rngs, batches):
    match = (
        r"(?s)rngs must be a key, or a dict of keys.*; got .*\. Write rngs={'dropout'"
    )
    with pytest.raises(TypeError, match=match):
        jaxbn.linen.population(LinenNoisy(), linen_variables(), batches, rngs=rngs)
