"""Test the function and the layers on meshes with explicit axes."""

from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import assert_near, rounded
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from layer_apis import APIS
from oracle import inference, random_case, train_step

import jaxbn.linen
import jaxbn.nnx

pytestmark = pytest.mark.usefixtures("standard_promotion")
C = 8
SPECS = [P(None, "m"), P("d", None), P("d", "m")]  # features, rows, both
ORIGINS = ["no context", "before", "inside", "numpy", "placed"]


class Function:
    """Hold the variables of the function, with the interface of the layers."""

    def __init__(self, library: str, shape: tuple[int, ...]):
        self.variables: Any = jaxbn.init(shape[-1])

    def apply(self, variables, x, train=True) -> Any:
        params, state = variables
        y, new = jaxbn.batch_norm(params, state, x, train, unbiased=False)
        return y, new._asdict()


LAYERS: dict[str, Any] = {**APIS, "function": Function}


@pytest.fixture(scope="module")
def mesh():
    types = (AxisType.Explicit,) * 2
    return jax.make_mesh((2, 4), ("d", "m"), axis_types=types)


def arrange(origin, tree, mesh) -> Any:
    """Make the variables as a user would: before the mesh, inside it, in NumPy."""
    if origin == "numpy":
        return jax.tree.map(np.asarray, tree)
    if origin == "placed":
        return jax.device_put(tree, NamedSharding(mesh, P()))
    with jax.set_mesh(mesh) if origin == "inside" else nullcontext():
        return jax.tree.map(lambda a: jnp.asarray(np.asarray(a)), tree)


@pytest.mark.usefixtures("unchecked_types")  # NumPy arrays are no JAX arrays
@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize(
    ("origin", "spec", "api"),
    [  # each pair of two of them
        (origin, spec, [*LAYERS][(i + j) % len(LAYERS)])
        for i, origin in enumerate(ORIGINS)
        for j, spec in enumerate(SPECS)
    ],
    ids=str,
)
def test_variables_may_come_from_outside_the_mesh(origin, spec, api, jit, mesh, rng):
    layer = LAYERS[api]("jaxbn", shape=(8, C))
    case = rounded(random_case(rng, (8, C)), "float32")
    new = {"mean": 0, "var": 1, "scale": 1, "bias": 0}
    vectors: Any = {name: np.full(C, v, np.float32) for name, v in new.items()}
    case = case._replace(**vectors)
    x = jax.device_put(case.x, NamedSharding(mesh, spec))
    for train in (True, False):
        variables = arrange(origin, layer.variables, mesh)
        apply = lambda variables, x, train=train: layer.apply(variables, x, train)  # noqa: E731
        with nullcontext() if origin == "no context" else jax.set_mesh(mesh):
            y, stats = (jax.jit(apply) if jit else apply)(variables, x)
        expected = train_step(case, unbiased=False) if train else inference(case)
        assert jax.typeof(y).sharding.spec == spec
        assert_near(y, expected.y, 2e-5)
        assert_near((stats["mean"], stats["var"]), (expected.mean, expected.var), 2e-5)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("inside", [True, False], ids=["grad inside", "grad outside"])
@pytest.mark.parametrize("masked", [True, False])
def test_rows_may_be_manual_and_features_explicit(check_vma, inside, masked, mesh, rng):
    """`shard_map` maps the data axis alone; features are sharded by their type."""
    case = rounded(random_case(rng, (8, C)), "float32")
    case = case._replace(dmean=0 * case.dmean, dvar=0 * case.dvar)
    mask = rng.uniform(0.1, 2, size=(8, 1)).astype(np.float32) if masked else None

    def step(params, x, state, dy, mask):
        y, new = jaxbn.batch_norm(params, state, x, True, mask=mask, axis_name="d")
        return jnp.sum(dy * y)[None], (y, new)

    def gradients(params, x, *others):
        def loss(params, x):
            losses, results = step(params, x, *others)
            return jnp.sum(losses), results

        (dparams, dx), results = jax.grad(loss, (0, 1), has_aux=True)(params, x)
        return (dparams if check_vma else jax.lax.psum(dparams, "d"), dx), results

    with jax.set_mesh(mesh):
        put = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))  # noqa: E731
        mean, var, scale, bias = (
            put(a, P("m")) for a in (case.mean, case.var, case.scale, case.bias)
        )
        params = jaxbn.BatchNormParams(scale, bias)
        state = jaxbn.BatchNormState(mean, var, jnp.float32(3))
        x, dy = (put(a, P("d", "m")) for a in (case.x, case.dy))
        weights = None if mask is None else put(mask, P("d", None))
        shard_map: Any = jax.shard_map
        options = {"axis_names": {"d"}, "check_vma": check_vma}
        options["in_specs"] = (P(), P("d"), P(), P("d"), P("d"))
        if inside:
            specs = ((P(), P("d")), (P("d"), P()))
            mapped = shard_map(gradients, out_specs=specs, **options)
            (dparams, dx), (y, new) = jax.jit(mapped)(params, x, state, dy, weights)
        else:
            mapped = shard_map(step, out_specs=(P("d"), (P("d"), P())), **options)

            def loss(params, x, *others):
                losses, results = mapped(params, x, *others)
                return jnp.sum(losses), results

            grad = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
            (dparams, dx), (y, new) = grad(params, x, state, dy, weights)
    want = train_step(case, mask=mask)
    assert_near((y, new.mean, new.var), (want.y, want.mean, want.var), 2e-5)
    assert_near((dx, *dparams), (want.dx, want.dscale, want.dbias), 2e-5)


@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_statistics_and_population_of_sharded_features(spec, masked, mesh, rng):
    """The parts and the population have no running mean that could guess one."""
    x = rng.normal(3.0, 2.0, size=(16, C)).astype(np.float32)
    mask = (rng.random((16, 1)) < 0.7) if masked else np.ones((16, 1), bool)
    kept = x[mask[:, 0]].astype(np.float64)
    mean, var, biased = kept.mean(0), kept.var(0, ddof=1), kept.var(0)
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, spec)
        weights = jnp.asarray(mask) if masked else None
        batch = jaxbn.batch_statistics(placed, mask=weights)
        _, state = jaxbn.init(C)
        scalar = batch._replace(n=len(kept))
        new = jaxbn.update_running_stats(state, scalar, momentum=0.0)
        population = jaxbn.population([(placed, weights)] if masked else [placed])
    assert_near((batch.mean, batch.var), (mean, biased), 1e-6)
    assert_near((new.mean, new.var), (mean, var), 1e-6)
    assert_near((population.mean, population.var), (mean, var), 1e-6)


@pytest.mark.parametrize("library", [*APIS])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_population_of_a_model_with_sharded_features(spec, library, mesh, rng):
    x = rng.normal(3.0, 2.0, size=(16, C)).astype(np.float32)
    with jax.set_mesh(mesh):
        got = POPULATIONS[library](jax.device_put(x, spec))
    exact = x.astype(np.float64)
    assert_near(got, (exact.mean(0), exact.var(0, ddof=1)), 1e-6)


def linen_population(x):
    model = jaxbn.linen.BatchNorm(use_running_average=False)
    variables = model.init(jax.random.key(0), np.zeros(x.shape, np.float32))
    stats = jaxbn.linen.population(model, variables, [x])["batch_stats"]
    return stats["mean"], stats["var"]


def nnx_population(x):
    model = jaxbn.nnx.BatchNorm(C, rngs=nnx.Rngs(0))
    jaxbn.nnx.population(model, [x])
    return model.mean[...], model.var[...]


POPULATIONS = {"linen": linen_population, "nnx": nnx_population}
