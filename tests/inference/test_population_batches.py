"""Test population statistics of odd batches: foreign, not finite, in two passes."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from helpers import assert_near

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn._inference.accumulator import Accumulator

pytestmark = pytest.mark.usefixtures("standard_promotion")
C = 3
SIZES = (8, 5, 8)


@pytest.fixture
def batches(rng) -> list[np.ndarray]:
    return [
        (rng.normal(size=C) + 1.9 * rng.normal(size=(n, C))).astype(np.float32)
        for n in SIZES
    ]


def expected(batches):
    batches = [np.asarray(x, np.float64) for x in batches]
    n = np.array([len(x) for x in batches])
    mean = np.concatenate(batches).mean(0)
    return mean, np.average([x.var(0, ddof=1) for x in batches], axis=0, weights=n)


def populate_core(batches, **options):
    state = jaxbn.population(batches, **options)
    return state.mean, state.var


def populate_linen(batches, **options):
    model = linen.BatchNorm(use_running_average=True)
    variables: Any = model.init(jax.random.key(0), jnp.ones((1, C)))
    stats = jaxbn.linen.population(model, variables, batches, **options)["batch_stats"]
    return stats["mean"], stats["var"]


def populate_nnx(batches, **options):
    layer = nnx.BatchNorm(C, rngs=nnx.Rngs(0))
    jaxbn.nnx.population(layer, batches, **options)
    return layer.mean[...], layer.var[...]


# Tensors of other libraries.


class OnlyArray:
    """Have no shape and no dtype, only a conversion to NumPy."""

    def __init__(self, x):
        self.x = x

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.x, dtype)


class OnlyDLPack:
    """Have no conversion to NumPy; NumPy has no bfloat16."""

    def __init__(self, x):
        self.x: Any = jnp.asarray(x)

    def __dlpack__(self, **options):
        return self.x.__dlpack__(**options)

    def __iter__(self):
        return map(OnlyDLPack, self.x)

    def __dlpack_device__(self):
        return self.x.__dlpack_device__()


def torch_tensor(x):
    return pytest.importorskip("torch").tensor(np.asarray(x))


def torch_bfloat16(x):
    torch: Any = pytest.importorskip("torch")
    x = np.asarray(x)
    return torch.tensor(x).to(torch.bfloat16 if x.dtype == np.float32 else None)


FOREIGN = {
    "__array__": OnlyArray,
    "DLPack": OnlyDLPack,
    "torch": torch_tensor,
    "torch bfloat16": torch_bfloat16,
}


@flax.struct.dataclass
class Example:
    image: Any
    mask: Any


CONTAINERS: dict[str, Any] = {
    "tuple": lambda x, mask: (x, mask),
    "list": lambda x, mask: [x, mask],
    "dict": lambda x, mask: {"image": x, "mask": mask, "label": np.arange(2)},
    "dataclass": Example,
}
READ: dict[str, Any] = {
    "tuple": tuple,
    "list": tuple,
    "dict": lambda batch: (batch["image"], batch["mask"]),
    "dataclass": lambda batch: (batch.image, batch.mask),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_batches_may_be_foreign_tensors(kind, batches):
    foreign, batches = FOREIGN[kind], [x[:5] for x in batches]
    if kind == "torch bfloat16":
        batches = [np.asarray(jnp.asarray(x, "bfloat16"), np.float32) for x in batches]
    for populate in (populate_core, populate_linen, populate_nnx):
        assert_near(populate(map(foreign, batches)), expected(batches))
    mask = np.arange(5)[:, None] < 3
    for pair in (tuple, list):
        pairs = [pair([foreign(x), foreign(mask)]) for x in batches]
        assert_near(populate_core(pairs), expected([x[:3] for x in batches]))


@pytest.mark.parametrize("kind", CONTAINERS)
@pytest.mark.parametrize("populate", [populate_linen, populate_nnx])
def test_containers_may_hold_foreign_tensors(populate, kind, batches):
    def call(model, batch):
        x, mask = READ[kind](batch)
        return model(x, mask=mask)

    batches, mask = [x[:5] for x in batches], np.arange(5)[:, None] < 3
    pairs = [CONTAINERS[kind](OnlyArray(x), OnlyDLPack(mask)) for x in batches]
    assert_near(populate(pairs, call=call), expected([x[:3] for x in batches]))


class Neither:
    dtype = "float32"


@pytest.mark.parametrize("populate", [populate_core, populate_linen, populate_nnx])
@pytest.mark.usefixtures("unchecked_types")
def test_what_cannot_be_converted_is_refused(populate, batches):
    match = "that JAX knows; got Neither of float32.*(?s:.*)In batch 1"
    with pytest.raises(TypeError, match=match):
        populate([batches[0], Neither()])
    for one in (OnlyDLPack(batches[0]), OnlyArray(batches[0])):
        match = "must be an iterable of batches; got Only"
        with pytest.raises(TypeError, match=match):
            populate(one)


def test_torch_tensors_with_gradients_and_one_tensor_are_refused(batches):
    torch: Any = pytest.importorskip("torch")
    leaf = torch.tensor(batches[0], requires_grad=True)
    with pytest.raises(TypeError, match=r"got Tensor of torch\.float32"):
        populate_core([leaf])
    with pytest.raises(TypeError, match=r"got Tensor of shape \(8, 3\), which is one"):
        populate_core(torch.tensor(batches[0]))


# Batches that are not finite.


class LinenTwo(linen.Module):
    @linen.compact
    def __call__(self, x):
        options: dict[str, Any] = {"momentum": None, "use_running_average": True}
        jaxbn.linen.BatchNorm(**options, name="first")(x)
        return jaxbn.linen.BatchNorm(**options, name="second")(1 / x)


class NNXTwo(nnx.Module):
    def __init__(self):
        options: dict[str, Any] = {"momentum": None, "rngs": nnx.Rngs(0)}
        self.first = jaxbn.nnx.BatchNorm(C, **options)
        self.second = jaxbn.nnx.BatchNorm(C, **options)

    def __call__(self, x):
        return self.first(x), self.second(1 / x)


def two_linen(batches, **options):
    variables = LinenTwo().init(jax.random.key(0), batches[0])
    new: Any = jaxbn.linen.population(LinenTwo(), variables, batches, **options)
    layers = new["batch_stats"]
    return [
        (layers[name]["mean"], layers[name]["var"], layers[name]["count"])
        for name in ("first", "second")
    ]


def two_nnx(batches, **options):
    model = NNXTwo()
    jaxbn.nnx.population(model, batches, **options)
    layers = (model.first, model.second)
    return [(a.mean[...], a.var[...], a.count[...]) for a in layers]


@pytest.mark.parametrize("run", [two_linen, two_nnx])
def test_a_batch_that_is_not_finite_in_one_layer_is_left_out_in_all(run, batches):
    """The input of the second layer is infinite, and the first one's is not."""
    zero = batches[1].copy()
    zero[2, 1] = 0
    stream = [batches[0], zero, batches[2], np.full_like(zero, np.nan)]
    match = r"inf or NaN in batch 1, for 'second' \(1 of 3 features\)\. Look"
    with pytest.raises(ValueError, match=match):
        run(stream)
    with pytest.warns(
        UserWarning, match=r"in their statistics, by number from 0: 1, 3"
    ):
        first, second = run(stream, skip_nonfinite=True)
    kept = [batches[0], batches[2]]
    assert_near(first, (*expected(kept), np.float64(2)))
    inverse = [1 / np.float64(x) for x in kept]
    assert_near(second, (*expected(inverse), np.float64(2)))


def test_skipped_arrays_have_no_influence(batches):
    """Overflow of n·var is not finite either; masked elements do not matter."""
    large, nan = np.ones((8, C), np.float32), np.full((2, C), np.nan, np.float32)
    large[::2] = 2e19
    # n²/(n-1)·var
    two = np.array([[1.1e19], [-1.1e19]], np.float32) * np.ones(C, np.float32)
    stream = [nan, large, *batches, two, (large * np.inf, np.zeros((8, 1), bool))]
    stream += [(np.concatenate([batches[0], nan]), np.arange(10)[:, None] < 8)]
    with pytest.warns(UserWarning, match=r"number from 0: 0, 1, 5\. Masks would"):
        state = jaxbn.population(stream, skip_nonfinite=True)
    assert_near(state[:2], expected([*batches, batches[0]]))
    assert state.count == 4
    with pytest.raises(ValueError, match=r"in batch 1, for 'x' \(3 of 3 features\)"):
        jaxbn.population([batches[0], large])


def test_a_weight_of_nan_makes_a_bad_batch(batches):
    weights = np.ones((8, 1), np.float32)
    weights[3] = np.nan
    with pytest.raises(ValueError, match="got inf or NaN in batch 1, for 'x'"):
        jaxbn.population([batches[0], (batches[2], weights)])


def test_statistics_must_fit_their_dtype():
    """Each batch is finite, and what lies between the batches overflows."""
    far = [np.full((8, C), value, np.float32) for value in (-3e19, 3e19)]
    with pytest.raises(
        ValueError, match="too large for float32 for 3 of 3 features of x"
    ):
        jaxbn.population(far, variance="total")
    model = jaxbn.linen.BatchNorm(
        True, param_dtype=jnp.float16, force_float32_reductions=False
    )
    variables: Any = model.init(jax.random.key(0), far[0])
    near = [x * np.float32(1e-15) for x in far]  # ±3e4, and a variance of 9e8
    match = r"too large for float16 for 3 of 3 features of layer ''\. Scale"
    with pytest.raises(ValueError, match=match):
        jaxbn.linen.population(model, variables, near, variance="total")


def test_population_within_jit_is_refused(batches):
    match = "population must be called outside of jit .*; got a traced batch or model"
    with pytest.raises(TypeError, match=match):
        jax.jit(lambda x: jaxbn.population([x]))(batches[0])
    with pytest.raises(TypeError, match=match):
        jax.jit(lambda: jaxbn.population(batches))()


# The count of batches, and two passes.


@pytest.mark.parametrize("seeds", [None, 2])
def test_the_count_is_the_most_batches_of_any_feature(seeds, batches):
    masks = [np.array([True, False, False]), np.array([True, True, False]), True]
    pairs = [
        (x, np.broadcast_to(m, x.shape)) for x, m in zip(batches, masks, strict=True)
    ]
    assert jaxbn.population(pairs).count == 3
    model = jaxbn.linen.BatchNorm(True, momentum=None)
    init, keys = model.init, jax.random.key(0)
    if seeds:
        init, keys = jax.vmap(init, (0, None)), jax.random.split(keys, seeds)
    variables: Any = init(keys, jnp.ones((1, C)))
    new: Any = jaxbn.linen.population(
        model, variables, pairs, call=lambda model, pair: model(pair[0], mask=pair[1])
    )
    count = np.full(() if seeds is None else (seeds,), 3.0)
    assert_near(new["batch_stats"]["count"], count)


@pytest.mark.parametrize("variance", ["paper", "total"])
def test_two_passes_merge_to_one(variance, rng):
    """The mean is exact, and the variance to 2/N, of a stream in random order."""
    batches = list(rng.normal(3, 2, size=(30, 512, C)).astype(np.float32))
    first, second = (
        jaxbn.population(part, variance=variance)
        for part in (batches[:10], batches[10:])
    )
    merged = jaxbn.merge_states([first, second], weights=[10 * 512, 20 * 512])
    whole = jaxbn.population(batches, variance=variance)
    assert_near(merged.mean, whole.mean, 1e-6)
    assert_near(merged.var, whole.var, (2 if variance == "total" else 20) / (30 * 512))
    assert merged.count == whole.count == 30


@pytest.mark.parametrize("populate", [populate_core, populate_linen, populate_nnx])
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float4_e2m1fn"])
def test_dtypes_below_16_bits_are_refused(populate, dtype, batches):
    with pytest.raises(TypeError, match=rf"x must have 16 bits or more; got {dtype}"):
        populate([batches[0].astype(dtype)])


@pytest.mark.parametrize("mask", [None, (1, 2), (2**33, 1)])
def test_accumulators_count_beyond_int32(mask):
    mask = None if mask is None else jax.ShapeDtypeStruct(mask, jnp.bool)
    x = jax.ShapeDtypeStruct((2**33, 2), jnp.bfloat16)
    new = jax.eval_shape(lambda x, mask: Accumulator.from_batch(x, mask, (1,)), x, mask)
    assert {(part.shape, part.dtype.name) for part in new} == {((2,), "float32")}
