"""The variants as layers: virtual batches, batch renorm, statistics left alone."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax_helpers import assert_same
from helpers import assert_near
from layer_apis import APIS
from oracle import random_case, renorm_step, train_step, virtual_step

import jaxbn

pytestmark = pytest.mark.usefixtures("standard_promotion")
C = 3


@pytest.fixture(params=APIS)
def create(request):
    """Return a function that creates a layer with its initial variables."""
    return APIS[request.param]


@pytest.fixture
def case(rng):
    """Return a case with the initial variables of a layer."""
    ones, zeros = np.ones(C), np.zeros(C)
    case = random_case(rng, (12, 5, C), loc=0.3)
    case = case._replace(x=case.x.astype(np.float32), scale=ones, bias=zeros)
    return case._replace(mean=zeros, var=ones, batches=0)


def assert_step(layer, case, want):
    y = layer(case.x)
    assert_near((y, layer.stats["mean"], layer.stats["var"]), (want.y, *want[1:3]))


@pytest.mark.parametrize("size", [3, 12])
def test_virtual_batches_match_oracle(create, size, case):
    layer = create("jaxbn", virtual_batch_size=size, momentum=0.9)
    options = {"momentum": 0.9, "unbiased": False}
    assert_step(layer, case, virtual_step(case, size, **options))


def test_virtual_batches_do_not_exist_at_inference(create, case):
    layer = create("jaxbn", virtual_batch_size=5)
    assert layer(case.x[:7], train=False).shape == (7, 5, C)
    with pytest.raises(ValueError, match="divide the 7 examples"):
        layer(case.x[:7])


def test_linen_init_takes_a_batch_of_any_size():
    layer = jaxbn.linen.BatchNorm(False, virtual_batch_size=32)
    layer.init(jax.random.key(0), jnp.ones((1, C)))


def test_renorm_matches_oracle(create, case):
    layer = create("renorm", r_max=1.5, d_max=0.2, momentum=0.9)
    options = {"momentum": 0.9, "unbiased": False}
    assert_step(layer, case, renorm_step(case, r_max=1.5, d_max=0.2, **options))


def test_renorm_defaults_are_the_paper_s(create, case):
    want = renorm_step(case, r_max=3.0, d_max=5.0, unbiased=False)
    assert_step(create("renorm"), case, want)


def test_renorm_has_the_variables_of_batch_norm(create):
    renorm, plain = create("renorm"), create("jaxbn")
    assert_same(renorm.variables, plain.variables, 0)


def test_renorm_follows_schedules_of_its_own_step(create, case):
    """Batch norm for two steps, then limits that grow; one compilation for all."""
    r_max = optax.linear_schedule(1.0, 3.0, 4, transition_begin=2)
    d_max = optax.linear_schedule(0.0, 5.0, 4, transition_begin=2)
    layer = create("renorm", r_max=r_max, d_max=d_max, momentum=0.7)
    limits = [(1, 0), (1, 0), (1, 0), (1.5, 1.25), (2, 2.5)]
    for step, (r, d) in enumerate(limits):
        assert layer.stats["count"] == step
        options = {"momentum": 0.7, "unbiased": False}
        want = renorm_step(case, r_max=r, d_max=d, **options)
        assert_step(layer, case, want)
        case = case._replace(mean=want.mean, var=want.var, x=1.5 * case.x + 0.4)


def test_renorm_rounds_no_schedule_below_its_limits(create, case):
    """optax's first value is 0.99999988 in float32."""
    r_max = optax.linear_schedule(1.0, 2.1, 1000)
    assert float(np.asarray(r_max(0))) < 1
    for limit in (r_max, lambda step: 0.5):
        layer = create("renorm", r_max=limit, d_max=lambda step: -1e-7)
        plain = create("renorm", r_max=1.0, d_max=0.0)
        assert_same(layer(case.x), plain(case.x), 0)


def test_renorm_of_equal_weights_shares_the_count(create, case):
    layer = create("renorm", r_max=lambda step: 1.0 + step, momentum=None)
    for step in range(3):
        want = renorm_step(
            case, r_max=1.0 + step, d_max=5.0, momentum=None, unbiased=False
        )
        assert_step(layer, case, want)
        case = case._replace(mean=want.mean, var=want.var, batches=step + 1)


def test_renorm_inference_is_that_of_batch_norm(create, case, rng):
    renorm, plain = create("renorm"), create("jaxbn")
    for layer in (renorm, plain):
        layer.randomize(np.random.default_rng(2))
    assert_same(renorm(case.x, train=False), plain(case.x, train=False), 0)


def test_renorm_rejects_virtual_batches(create, case):
    message = re.escape("BatchRenorm has no virtual_batch_size")
    with pytest.raises(ValueError, match=message):
        create("renorm", virtual_batch_size=3)(case.x)


def test_nnx_schedule_set_afterwards_needs_a_count(case):
    layer = jaxbn.nnx.BatchRenorm(C, rngs=nnx.Rngs(0))
    layer.r_max = lambda step: 1.0
    with pytest.raises(ValueError, match="a schedule needs the layer's count"):
        layer(case.x)


@pytest.mark.parametrize("library", ["jaxbn", "renorm"])
def test_statistics_left_alone_still_normalize_by_the_batch(create, library, case):
    layer, updating = create(library), create(library)
    before = layer.stats
    y = layer(case.x, update_statistics=False)
    assert_same(y, updating(case.x), 0)
    assert_same(layer.stats, before, 0)


def test_gradient_flows_through_statistics_that_are_left_alone(create, case):
    """The gradient of training, not that of constant statistics."""
    layer = create("jaxbn")

    def loss(x):
        y, _ = layer.apply(layer.variables, x, update_statistics=False)
        return jnp.sum(case.dy.astype(np.float32) * y)

    case = case._replace(dmean=np.zeros(C), dvar=np.zeros(C))
    assert_near(jax.grad(loss)(case.x), train_step(case).dx)


def test_linen_statistics_left_alone_need_not_be_mutable(case):
    layer = jaxbn.linen.BatchNorm(use_running_average=False, momentum=None)
    variables = layer.init(jax.random.key(0), case.x)
    y = layer.apply(variables, case.x, update_statistics=False)
    expected, _ = layer.apply(variables, case.x, mutable=["batch_stats"])
    assert_same(y, expected, 0)
    counts = {**variables, "batch_stats": dict(variables["batch_stats"])}
    del counts["batch_stats"]["count"]
    assert_same(layer.apply(counts, case.x, update_statistics=False), expected, 0)


def test_second_pass_of_sam_leaves_statistics_alone(case):
    """One update of the statistics in a step with two passes, in a whole nnx model."""

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(C, 4, rngs=rngs)
            self.norm = jaxbn.nnx.BatchNorm(4, rngs=rngs)

        def __call__(self, x, update=True):
            return self.norm(self.linear(x), update_statistics=update)

    model = Model(nnx.Rngs(0))
    grads = nnx.grad(lambda m: jnp.sum(jnp.sin(m(case.x))))(model)
    once = model.norm.mean[...]
    moved = jax.tree.map(lambda p, g: p + 0.1 * g, nnx.state(model, nnx.Param), grads)
    nnx.update(model, moved)
    nnx.grad(lambda m: jnp.sum(jnp.sin(m(case.x, update=False))))(model)
    assert_same(model.norm.mean[...], once, 0)


def test_population_reaches_layers_of_variants(case):
    layer = jaxbn.linen.BatchRenorm(use_running_average=False, r_max=lambda _: 1.0)
    variables = layer.init(jax.random.key(0), case.x)

    def call(layer, x):
        return layer(x, update_statistics=False)

    new = jaxbn.linen.population(layer, variables, [case.x], call=call)
    exact = case.x.reshape(-1, C).astype(np.float64)
    assert_near(new["batch_stats"]["mean"], exact.mean(0))


def test_variants_are_batch_norms_of_flax():
    assert issubclass(jaxbn.linen.BatchRenorm, nn.BatchNorm)
    assert issubclass(jaxbn.nnx.BatchRenorm, nnx.BatchNorm)
