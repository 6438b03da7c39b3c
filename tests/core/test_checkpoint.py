"""The checkpoint policy: what is saved, what is computed again, and the gradient."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from helpers import assert_near, saved_residuals

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn._core import sync

DEPTH, SHAPE, C = 3, (8, 6, 6, 4), 4
P = jax.P


def arguments(rng):
    kernels = [0.3 * rng.normal(size=(3, 3, C, C)) for _ in range(DEPTH)]
    return [jnp.asarray(a, jnp.float32) for a in (*kernels, rng.normal(size=SHAPE))]


def network(*kernels_and_x, **options):
    """Return the loss of `DEPTH` layers of convolution, batch norm and ReLU."""
    *kernels, x = kernels_and_x
    params, state = jaxbn.init(C)
    for kernel in kernels:
        x = nn.relu(normalized(kernel, x, params, state, options))
    return jnp.sum(jnp.sin(x))


def normalized(kernel, x, params, state, options):
    layout = ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=layout
    )
    y, _ = jaxbn.batch_norm(params, state, x, True, **options)
    return y


def with_policy(function):
    return jax.checkpoint(function, policy=jaxbn.checkpoint_policy)


def count_images(function, values):
    saved = saved_residuals(function, *values)
    return [np.shape(a) for a in saved].count(SHAPE)


def test_policy_saves_the_inputs_of_batch_norm_and_vectors(rng):
    """One array for each layer, where at least two are kept without the policy."""
    values = arguments(rng)
    kernel, image = np.shape(values[0]), SHAPE
    shapes = [np.shape(a) for a in saved_residuals(with_policy(network), *values)]
    assert shapes.count(image) == DEPTH + 1  # and the network's input
    assert {np.size(np.empty(s)) for s in shapes if s not in (image, kernel)} <= {1, C}
    assert count_images(network, values) >= 2 * DEPTH + 1


def count(primitive, function, *values):
    """Count an operation, once for each call of the function that holds it.

    A jaxpr's text shows a function once, however often it is called.
    """

    def in_jaxpr(jaxpr):
        return sum(
            bool(re.fullmatch(primitive, e.primitive.name))
            + sum(map(in_jaxpr, jaxprs_in(e)))
            for e in jaxpr.eqns
        )

    return in_jaxpr(jax.make_jaxpr(function)(*values))


def jaxprs_in(equation):
    leaves = jax.tree.leaves(list(equation.params.values()))
    return [a for a in leaves if hasattr(a, "eqns")]


@pytest.mark.parametrize("operation", ["conv_general_dilated", "reduce_sum"])
def test_policy_runs_no_convolution_and_no_sum_twice(operation, rng):
    values = arguments(rng)
    every = tuple(range(len(values)))
    plain, saving = (jax.grad(f, every) for f in (network, with_policy(network)))
    counts = [count(operation, f, *values) for f in (plain, saving)]
    assert counts[0] == counts[1] >= 2 * DEPTH


@pytest.mark.parametrize("autodiff", ["custom_vjp", "jax"])
def test_policy_does_not_change_gradients(autodiff, rng):
    values = arguments(rng)
    every = tuple(range(len(values)))

    def loss(*values):
        return network(*values, autodiff=autodiff)

    plain, saving = (jax.jit(jax.grad(f, every)) for f in (loss, with_policy(loss)))
    assert_near(saving(*values), plain(*values))


@pytest.mark.parametrize("devices", ["few", "many"])
@pytest.mark.parametrize("check_vma", [True, False])
def test_policy_runs_no_collective_twice(check_vma, devices, rng, monkeypatch):
    """Many devices sum in two psums, few in one."""
    if devices == "many":
        monkeypatch.setattr(sync, "MAX_GATHERED_DEVICES", 1)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def gradients(wrap):
        def loss(*values):
            return network(*values, axis_name="data")

        def device(*values):
            return jax.grad(wrap(loss), DEPTH)(*values)

        return jax.shard_map(
            device,
            mesh=mesh,
            in_specs=(*[P()] * DEPTH, P("data")),
            out_specs=P("data"),
            check_vma=check_vma,
        )

    values = arguments(rng)
    plain, saving = (gradients(wrap) for wrap in (lambda f: f, with_policy))
    jax.clear_caches()  # jit does not see the change
    psums = [count(r"psum\w*", jax.jit(f), *values) for f in (plain, saving)]
    assert psums[0] == psums[1] > 0
    assert_near(jax.jit(saving)(*values), jax.jit(plain)(*values))
    jax.clear_caches()


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(C, (3, 3), use_bias=False)(x)
        return nn.relu(jaxbn.linen.BatchNorm(use_running_average=False)(x))


def linen_network(wrap):
    """Return a loss of `(params, x)` with new statistics, and the parameters."""
    saving = nn.remat(LinenBlock, policy=jaxbn.checkpoint_policy)
    model = nn.Sequential([(saving if wrap else LinenBlock)() for _ in range(DEPTH)])
    variables = model.init(jax.random.key(0), jnp.ones(SHAPE))

    def loss(params, x):
        old = {**variables, "params": params}
        y, new = model.apply(old, x, mutable=["batch_stats"])
        return jnp.sum(jnp.sin(y)), new

    return loss, variables["params"]


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(C, C, (3, 3), use_bias=False, rngs=rngs)
        self.norm = jaxbn.nnx.BatchNorm(C, use_running_average=False, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.norm(self.conv(x)))


def nnx_network(wrap):
    blocks = nnx.List([NnxBlock(nnx.Rngs(i)) for i in range(DEPTH)])
    graph, params, others = nnx.split(blocks, nnx.Param, ...)
    saving = nnx.remat(NnxBlock.__call__, policy=jaxbn.checkpoint_policy)

    def loss(params, x):
        blocks = nnx.merge(graph, params, others, copy=True)
        for block in blocks:
            x = saving(block, x) if wrap else block(x)
        return jnp.sum(jnp.sin(x)), nnx.state(blocks, nnx.BatchStat)

    return loss, params


@pytest.mark.usefixtures("any_rank")
@pytest.mark.parametrize("network", [linen_network, nnx_network])
def test_flax_remat_takes_the_policy(network, rng):
    x = jnp.asarray(rng.normal(size=SHAPE), jnp.float32)
    images, results = [], []
    for wrap in (False, True):
        loss, params = network(wrap)
        images.append(count_images(lambda p, x: loss(p, x)[0], (params, x)))  # noqa: B023
        results.append(jax.grad(loss, (0, 1), has_aux=True)(params, x))
    # x of each layer, the input of each block, and the loss's residual.
    assert images[1] == 2 * DEPTH + 1 < images[0]
    gradients, expected = (jax.tree.leaves(r) for r in reversed(results))
    assert_near(gradients, expected)


# But for nnx, where Flax's `promote_dtype` copies an array that is traced.
STEPS = {
    "batch_norm": lambda x: jaxbn.batch_norm(*jaxbn.init(C), x, True)[0],
    "inference": lambda x: jaxbn.batch_norm(*jaxbn.init(C), x, False)[0],
    "batch_renorm": lambda x: jaxbn.batch_renorm(*jaxbn.init(C), x, True)[0],
    "batch_statistics": lambda x: jaxbn.batch_statistics(x).var,
    "normalize": lambda x: jaxbn.normalize(
        jaxbn.init(C)[0], jnp.zeros(C), jnp.ones(C), x
    ),
    "linen": lambda x: jaxbn.linen.BatchNorm(False).init_with_output(
        jax.random.key(0), x
    )[0],
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_backward_keeps_the_callers_x_not_a_copy(step, rng):
    x = jnp.asarray(rng.normal(size=SHAPE), jnp.float32)
    _, vjp = jax.vjp(step, x)
    kept = [a for a in jax.tree.leaves(vjp) if np.shape(a) == SHAPE]
    pointers = {a.unsafe_buffer_pointer() for a in kept}
    assert pointers == {x.unsafe_buffer_pointer()}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_x_may_be_an_array_of_numpy(step, rng):
    """Some JAX hand it to the backward pass as it came."""
    x = rng.normal(size=SHAPE).astype(np.float32)
    dy = jax.random.normal(jax.random.key(0), jax.eval_shape(step, x).shape)
    assert_near(jax.vjp(step, x)[1](dy), jax.vjp(step, jnp.asarray(x))[1](dy))


@pytest.fixture
def remat3():
    jax.config.update("jax_remat3", True)
    yield
    jax.config.update("jax_remat3", False)


def test_policy_saves_no_less_under_remat3(remat3, rng):
    """Of a dense layer, batch norm and ReLU, nothing but the ReLU is computed again."""

    def loss(kernel, x):
        y, _ = jaxbn.batch_norm(*jaxbn.init(C), x @ kernel, True)
        return jnp.sum(jnp.sin(nn.relu(y)))

    kernel, x = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((C, C), (8, C)))
    expected = jax.value_and_grad(loss, (0, 1))(kernel, x)
    step = jax.jit(jax.value_and_grad(with_policy(loss), (0, 1)))
    assert_near(step(kernel, x), expected)
    program = step.lower(kernel, x).as_text()
    assert program.count("stablehlo.dot_general") == 3
