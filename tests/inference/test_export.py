"""Test `jax.export` of programs for several platforms, serialized and loaded."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jaxbn
from jaxbn import BatchNormParams, BatchNormState
from jaxbn._core.sums.cpu import MIN_SIZE_FOR_CPU_FORMS

PLATFORMS = ("cpu", "cuda", "tpu")
BATCH, IN, OUT = 65536, 3, 5
assert (
    BATCH * OUT >= MIN_SIZE_FOR_CPU_FORMS
)  # so that the platforms have different forms

# JAX registers types once per process; loading needs the same names.
for cls in (BatchNormParams, BatchNormState):
    name = f"jaxbn.{cls.__name__}"
    export.register_namedtuple_serialization(cls, serialized_name=name)


def inference(params, state, x):
    y, _ = jaxbn.batch_norm(params["norm"], state, x @ params["kernel"], False)
    return jnp.tanh(y)


def train_step(params, state, x):
    """Return the loss, new parameters by one gradient step, and new statistics."""

    def loss(params):
        x_norm = x @ params["kernel"]
        y, new = jaxbn.batch_norm(params["norm"], state, x_norm, True, momentum=0.9)
        return jnp.mean((jnp.tanh(y) - 0.3) ** 2), new

    (cost, state), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return cost, jax.tree.map(lambda p, dp: p - dp, params, grads), state


def variables(rng):
    vectors = rng.uniform(0.5, 1.5, (4, OUT)).astype(np.float32)
    scale, bias, mean, var = map(jnp.asarray, vectors)
    kernel = jnp.asarray(rng.normal(size=(IN, OUT)), jnp.float32)
    params = {"kernel": kernel, "norm": BatchNormParams(scale, bias)}
    return params, BatchNormState(mean, var, jnp.int32(7))


def inputs(rng, batch=BATCH, mean=0.0):
    return jnp.asarray(mean + rng.normal(size=(batch, IN)), jnp.float32)


def shapes(rng, batch):
    x = jax.ShapeDtypeStruct(export.symbolic_shape(f"{batch}, {IN}"), jnp.float32)
    return *jax.eval_shape(lambda: variables(rng)), x


def export_for(platforms, function, rng, batch: int | str = BATCH):
    return export.export(jax.jit(function), platforms=platforms)(*shapes(rng, batch))


@pytest.mark.parametrize("function", [inference, train_step])
@pytest.mark.parametrize("batch", [64, BATCH, "batch"])
def test_loaded_program_matches_the_function(function, batch, rng):
    serialized = export_for(PLATFORMS, function, rng, batch).serialize()
    loaded = export.deserialize(serialized)
    assert loaded.platforms == PLATFORMS
    call, function = jax.jit(loaded.call), jax.jit(function)
    sizes = (BATCH, 2 * BATCH + 1, 2) if batch == "batch" else (batch,)
    for size in sizes:
        for mean in (0, 30):  # sums about 0, then about the mean of a sample
            arguments = *variables(rng), inputs(rng, size, mean)
            assert_same(call(*arguments), function(*arguments))


def assert_same(actual, expected):
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("shape", ["b, 3", "b, h, 4, 3"])
def test_symbolic_batch_export_matches_the_function(shape, train, rng):
    params, state = jaxbn.init(3)
    symbolic = jax.ShapeDtypeStruct(export.symbolic_shape(shape), jnp.float32)

    @jax.jit
    def value_and_gradient(x):
        apply = lambda x: jaxbn.batch_norm(params, state, x, train)[0]  # noqa: E731
        y, vjp = jax.vjp(apply, x)
        return y, vjp(y**2)[0]

    exported = export.export(value_and_gradient, platforms=PLATFORMS)(symbolic)
    exported = export.deserialize(exported.serialize())
    x = jnp.asarray(rng.normal(size=(7, 5, 4, 3)[-symbolic.ndim :]), jnp.float32)
    assert_same(exported.call(x), value_and_gradient(x))


def export_virtual_batches(batch, shape):
    """Export a step by virtual batches of 4."""
    params, state = jaxbn.init(3)

    @jax.jit
    def step(x):
        return jaxbn.batch_norm(params, state, x, True, virtual_batch_size=4)[0]

    x = jax.ShapeDtypeStruct(export.symbolic_shape(f"{batch}, {shape}"), jnp.float32)
    return step, export.export(step, platforms=PLATFORMS)(x)


def test_virtual_batches_of_a_symbolic_multiple(rng):
    step, exported = export_virtual_batches("4*b", "3")
    x = jnp.asarray(rng.normal(size=(12, 3)), jnp.float32)
    assert_same(export.deserialize(exported.serialize()).call(x), step(x))


@pytest.mark.parametrize("batch", ["b", "2*b", "b + 1"])
def test_virtual_batches_of_a_symbolic_batch_are_rejected(batch):
    with pytest.raises(ValueError, match=r"got 4 for .*b.* with a multiple.*\"4\*b\""):
        export_virtual_batches(batch, "h, 3")


def test_loaded_layer_is_differentiated_by_its_exported_vjp(rng):
    """The loaded program has no custom_vjp; `vjp_order` exports the derivative."""

    def forward(params, state, x):
        y, new = jaxbn.batch_norm(params["norm"], state, x @ params["kernel"], True)
        return jnp.tanh(y), new.mean

    def gradients(forward):
        def loss(params, state, x):
            y, mean = forward(params, state, x)
            return jnp.sum(y**3) + jnp.sum(mean**2)

        return jax.jit(jax.grad(loss, (0, 2)))

    exported = export_for(PLATFORMS, forward, rng, "batch")
    arguments = *variables(rng), inputs(rng, 64)
    loaded = export.deserialize(exported.serialize(vjp_order=1))
    expected = gradients(forward)(*arguments)
    assert_same(gradients(loaded.call)(*arguments), expected)
    without = export.deserialize(exported.serialize())
    with pytest.raises(ValueError, match="VJP"):
        gradients(without.call)(*arguments)


# The forms of the sums in exported programs.


BARRIER = "stablehlo.optimization_barrier"


def choices(module, operation="stablehlo.reduce"):
    """Yield the branches of each `case` with `operation`, nested cases included."""
    for start in re.finditer(r'^( *)\S.*"stablehlo\.case".*\(\{\n', module, re.M):
        end = module.index(f"\n{start[1]}}})", start.end())
        body = module[start.end() : end]
        if operation in body:
            yield body.split(f"\n{start[1]}}}, {{\n")


@pytest.mark.parametrize("batch", [BATCH, "batch"])
def test_common_program_contains_the_form_of_each_platform(batch, rng):
    module = export_for(PLATFORMS, train_step, rng, batch).mlir_module()
    by_platform = [branches for branches in choices(module) if len(branches) == 3]
    by_accuracy = [branches for branches in choices(module) if len(branches) == 2]
    assert len(by_platform) == 2  # forward and backward
    assert len(by_accuracy) == 2  # the forward on a CPU and on a TPU
    barriers = 0
    for i, (cpu, cuda, other) in enumerate(by_platform):
        by_accuracy = [[*choices(form)] for form in (cpu, cuda, other)]
        assert [len(found) for found in by_accuracy] == [1 - i, 0, 1 - i]
        assert [("complex" in form) for form in (cpu, cuda, other)] == [0, 1, 0]
        assert BARRIER not in other
        barriers += cpu.count(BARRIER) + cuda.count(BARRIER)
    for cpu, *others in choices(module, BARRIER):
        if "stablehlo.reduce" not in cpu:  # barriers for vectors, outside the sums
            assert not any(BARRIER in other for other in others)
            barriers += cpu.count(BARRIER)
    assert module.count(BARRIER) == barriers > 0


@pytest.mark.parametrize("batch", [BATCH, "batch"])
@pytest.mark.parametrize("platform", PLATFORMS)
def test_single_platform_program_contains_one_form(platform, batch, rng):
    module = export_for([platform], train_step, rng, batch).mlir_module()
    branches = {len(branches) for branches in choices(module)}
    assert branches == ({1} if platform == "cuda" else {1, 2})
    is_cut = (platform, batch) == ("cuda", BATCH)  # the sums of the sample's rows
    assert (BARRIER in module) == (platform == "cpu" or is_cut)
    assert ("complex" in module) == (platform == "cuda")


def test_cpu_compiles_only_its_form_of_the_common_program(rng):
    loaded = export.deserialize(export_for(PLATFORMS, train_step, rng).serialize())
    compiled = jax.jit(loaded.call).lower(*shapes(rng, BATCH)).compile()
    text = compiled.as_text() or ""
    assert len(re.findall(r" conditional\(", text)) == 1  # in the forward
    assert "c64[" not in text
