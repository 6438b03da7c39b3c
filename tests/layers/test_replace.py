"""Test the replacement of batch norms that others wrote, in linen and nnx."""

import copy
import pickle
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax_helpers import assert_same
from helpers import assert_near

import jaxbn
import jaxbn.linen
import jaxbn.nnx

pytestmark = pytest.mark.usefixtures("standard_promotion", "any_rank")
C, MOMENTUM, EPSILON = 3, 0.8, 1e-3


@pytest.fixture
def x(rng):
    """A mean of 10,000 deviations, at which the formulas of the tests' layers cancel.

    A batch in half of which the mean differs tells masks from no masks.
    """
    x = 1e4 + rng.normal(size=(16, C)) + 3 * (np.arange(16) < 8)[:, None]
    return jnp.asarray(x, jnp.float32)


MASK = (np.arange(16) < 8)[:, None]


def expected(x, mask=None, unbiased=False):
    """Return y, running mean and running variance after one step."""
    x = np.asarray(x, np.float64)
    kept = x if mask is None else x[mask[:, 0]]
    mean, var = kept.mean(0), kept.var(0)
    y = (x - mean) / np.sqrt(var + EPSILON)
    var = var * len(kept) / (len(kept) - unbiased)
    return y, (1 - MOMENTUM) * mean, MOMENTUM + (1 - MOMENTUM) * var


# Layers of linen that others wrote, after the classes of several model zoos.


def cancelling(x, mask=None):
    weights = jnp.ones_like(x) if mask is None else jnp.asarray(mask, x.dtype)
    total = jnp.sum(weights * jnp.ones_like(x), 0)
    mean = jnp.sum(weights * x, 0) / total
    return mean, jnp.sum(weights * x**2, 0) / total - mean**2


class LinenBase(nn.Module):
    """Flax's fields and variables, with neither axis_index_groups nor param_dtype."""

    axis: int = -1
    momentum: float = MOMENTUM
    epsilon: float = EPSILON
    dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    axis_name: str | None = None

    def normalize(self, x, inference, mask=None):
        initializing = not self.has_variable("batch_stats", "mean")
        shape = (x.shape[-1],)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        var = self.variable("batch_stats", "var", jnp.ones, shape)
        batch = (mean.value, var.value) if inference else cancelling(x, mask)
        if not (inference or initializing):
            keep = self.momentum
            mean.value = keep * mean.value + (1 - keep) * batch[0]
            var.value = keep * var.value + (1 - keep) * batch[1]
        y = (x - batch[0]) * jax.lax.rsqrt(batch[1] + self.epsilon)
        if self.use_scale:
            y = y * self.param("scale", nn.initializers.ones, shape)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, shape)
        return jnp.asarray(y, self.dtype)


class LinenMasked(LinenBase):
    use_running_average: bool | None = None

    @nn.compact
    def __call__(self, x, use_running_average: bool | None = None, mask=None):
        inference = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        return self.normalize(x, inference, mask)


class LinenTrained(LinenBase):
    @nn.compact
    def __call__(self, inputs, training: bool):
        return self.normalize(inputs, not training)


class LinenSetup(LinenTrained):
    """Define the variables before the call, and the mode by a default."""

    def setup(self):
        self.scale = self.param("scale", nn.initializers.ones, (C,))
        self.bias = self.param("bias", nn.initializers.zeros, (C,))
        self.mean = self.variable("batch_stats", "mean", jnp.zeros, (C,))
        self.var = self.variable("batch_stats", "var", jnp.ones, (C,))

    def __call__(self, x, train=True):
        mean, var = cancelling(x) if train else (self.mean.value, self.var.value)
        return (x - mean) * jax.lax.rsqrt(var + self.epsilon) * self.scale + self.bias


class LinenNet(nn.Module):
    norm: Any

    @nn.compact
    def __call__(self, x, *args, **kwargs):
        return self.norm(name="bn")(x, *args, **kwargs)


LINEN_CALLS: dict[str, tuple[Any, tuple, dict]] = {
    "masked": (LinenMasked, (False,), {"mask": MASK}),
    "masked, by position": (LinenMasked, (False, MASK), {}),
    "no mask": (LinenMasked, (), {"use_running_average": False}),
    "training": (LinenTrained, (True,), {}),
    "setup": (LinenSetup, (), {}),
    "setup, train": (LinenSetup, (), {"train": True}),
}


def linen_step(net, x, args, kwargs, **options):
    variables = net.init(jax.random.key(0), x, *args, **kwargs)
    with jaxbn.linen.replace_batch_norm(**options) as served:
        y, updates = net.apply(variables, x, *args, **kwargs, mutable=["batch_stats"])
    stats = updates["batch_stats"]["bn"]
    assert set(stats) == {"mean", "var"}
    return (y, stats["mean"], stats["var"]), served


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("name", LINEN_CALLS)
def test_linen_layers_of_other_classes_match_oracle(name, unbiased, x):
    norm, args, kwargs = LINEN_CALLS[name]
    got, served = linen_step(
        LinenNet(norm), x, args, kwargs, also=[norm], unbiased=unbiased
    )
    mask = MASK if name.startswith("masked") else None
    assert_near(got, expected(x, mask, unbiased), 1e-3)
    assert served == ["bn"]


def test_linen_inference_uses_and_keeps_the_statistics(x):
    net = LinenNet(LinenTrained)
    variables = net.init(jax.random.key(0), x, True)
    with jaxbn.linen.replace_batch_norm(also=[LinenTrained]):
        y, updates = net.apply(variables, x, False, mutable=["batch_stats"])
        assert_near(net.apply(variables, x, False), y, 0)
    assert_same(updates["batch_stats"], variables["batch_stats"], 0)
    assert_near(y, np.asarray(x, np.float64) / np.sqrt(1 + EPSILON), 1e-6)


def test_linen_gradients_of_other_classes_equal_jaxbn_s(x):
    net, layer = (
        LinenNet(LinenTrained),
        jaxbn.linen.BatchNorm(False, momentum=MOMENTUM, epsilon=EPSILON),
    )
    variables: Any = net.init(jax.random.key(0), x, True)

    def loss(params, x, apply: Callable, *args):
        y, _ = apply(params, x, *args, mutable=["batch_stats"])
        return (jnp.tanh(y) * jnp.arange(16.0)[:, None]).sum()

    with jaxbn.linen.replace_batch_norm(also=[LinenTrained]):
        grads = jax.grad(loss, (0, 1), allow_int=True)(variables, x, net.apply, True)
    inner = jax.tree.map(lambda a: a, {k: v["bn"] for k, v in variables.items()})
    wanted = jax.grad(loss, (0, 1))(inner, x, layer.apply)
    got = {k: v["bn"] for k, v in grads[0].items()}, grads[1]
    assert_near(got, wanted, 1e-5)


def test_linen_subclass_that_calls_another_class_is_served(x):
    class Doubled(LinenTrained):
        @nn.compact
        def __call__(self, inputs, training: bool):
            return 2 * super().__call__(inputs, training)

    got, served = linen_step(LinenNet(Doubled), x, (True,), {}, also=[LinenTrained])
    y, *stats = expected(x)
    assert_near(got, (2 * y, *stats), 1e-3)
    assert served == ["bn"]


@pytest.mark.parametrize("kind", [LinenMasked, nn.BatchNorm])
def test_population_measures_replaced_linen_layers(kind, x):
    net = LinenNet(kind)
    variables = net.init(jax.random.key(0), x, True)
    with jaxbn.linen.replace_batch_norm(also=[LinenMasked]) as served:
        new: Any = jaxbn.linen.population(
            net, variables, [x, 2 * x], call=lambda model, x: model(x, True)
        )
    stats, wide = new["batch_stats"]["bn"], np.asarray(x, np.float64)
    var = 16 / 15 * (wide.var(0) + 4 * wide.var(0)) / 2
    assert_near((stats["mean"], stats["var"]), (1.5 * wide.mean(0), var), 1e-3)
    assert served == ["bn"]


# The paths that were served, and the warning.


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=False)(nn.Dense(C)(x))


class Deep(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = jaxbn.linen.BatchNorm(use_running_average=False, name="own")(x)
        shared = nn.BatchNorm(use_running_average=False, name="shared")
        x = Block()(x)
        x = Block()(x)
        return shared(shared(x))


def test_linen_context_holds_the_paths(x):
    net = Deep()
    with jaxbn.linen.replace_batch_norm() as served:
        assert not served
        variables = net.init(jax.random.key(0), x)
        jax.jit(net.apply, static_argnames="mutable")(
            variables, x, mutable=("batch_stats",)
        )
    names = ["Block_0/BatchNorm_0", "Block_1/BatchNorm_0", "shared"]
    assert served == names


@pytest.mark.parametrize("method", ["init", "apply"])
def test_linen_warns_where_nothing_was_replaced(method, x):
    net = LinenNet(LinenTrained)
    variables = net.init(jax.random.key(0), x, True)
    first = jax.random.key(0) if method == "init" else variables
    match = r"replaced nothing.*LinenTrained at 'bn'\. Pass also=\[LinenTrained\]"
    with (
        pytest.warns(UserWarning, match=match) as record,
        jaxbn.linen.replace_batch_norm() as served,
    ):
        getattr(net, method)(first, x, False)
    assert served == []
    assert len(record) == 1


def test_linen_does_not_warn_where_there_is_nothing_to_replace(x):
    """Neither without running statistics, nor for layers of jaxbn."""
    layer = jaxbn.linen.BatchNorm(use_running_average=False)
    with warnings.catch_warnings(action="error"):
        with jaxbn.linen.replace_batch_norm() as served:
            nn.Dense(2).init(jax.random.key(0), x)
            layer.init(jax.random.key(0), x)
        assert served == []


def test_linen_does_not_warn_after_an_error(x):
    net = LinenNet(LinenTrained)
    variables = net.init(jax.random.key(0), x, True)
    with (
        warnings.catch_warnings(action="error"),
        pytest.raises(ValueError, match="broadcast"),
        jaxbn.linen.replace_batch_norm(),
    ):
        net.apply(variables, x[:, :2], False)


# Layers of nnx.


class NNXBase(nnx.Module):
    def __init__(self, num_features, *, momentum=MOMENTUM, rngs=None):
        self.momentum, self.epsilon = momentum, EPSILON
        self.scale = nnx.Param(jnp.ones(num_features))
        self.bias = nnx.Param(jnp.zeros(num_features))
        self.mean = nnx.BatchStat(jnp.zeros(num_features))
        self.var = nnx.BatchStat(jnp.ones(num_features))

    def normalize(self, x, inference, mask=None):
        batch = (self.mean[...], self.var[...]) if inference else cancelling(x, mask)
        if not inference:
            keep = self.momentum
            self.mean[...] = keep * self.mean[...] + (1 - keep) * batch[0]
            self.var[...] = keep * self.var[...] + (1 - keep) * batch[1]
        y = (x - batch[0]) * jax.lax.rsqrt(batch[1] + self.epsilon)
        return y * self.scale[...] + self.bias[...]


class NNXTrained(NNXBase):
    def __call__(self, inputs, train=True):
        return self.normalize(inputs, not train)


class NNXMasked(NNXBase):
    use_running_average = False

    def __call__(self, x, use_running_average=None, *, mask=None):
        if use_running_average is None:
            use_running_average = self.use_running_average
        return self.normalize(x, use_running_average, mask)


class NNXOwnCall(nnx.BatchNorm):
    """A subclass of Flax's that computes by itself."""

    def __init__(self, num_features, **options: Any):
        super().__init__(num_features, epsilon=EPSILON, **options)

    def __call__(self, x, use_running_average=None, *, mask=None):
        mean, var = cancelling(x, mask)
        self.mean[...], self.var[...] = mean, var
        return (x - mean) * jax.lax.rsqrt(var + self.epsilon)


class NNXSubclass(nnx.BatchNorm):
    """A subclass of Flax's without a call, with other arguments."""

    def __init__(self, num_features, *, momentum=MOMENTUM, **options):
        super().__init__(num_features, momentum=momentum, **options)
        self.epsilon, self.own = EPSILON, 7

    def doubled(self, x):
        return 2 * self(x)


class NNXGrandchild(NNXSubclass):
    pass


NNX_CALLS: dict[str, tuple[Any, tuple, dict]] = {
    "default": (NNXTrained, (), {}),
    "train": (NNXTrained, (), {"train": True}),
    "position": (NNXTrained, (True,), {}),
    "attribute": (NNXMasked, (), {}),
    "masked": (NNXMasked, (False,), {"mask": MASK}),
    "subclass": (NNXSubclass, (), {}),
    "subclass, masked": (NNXSubclass, (), {"mask": MASK}),
    "grandchild": (NNXGrandchild, (False,), {}),
    "own call": (NNXOwnCall, (), {"mask": MASK}),
}


def make(kind) -> Any:
    return kind(C, momentum=MOMENTUM, rngs=nnx.Rngs(0))


def nnx_step(layer, x, args, kwargs):
    y = nnx.jit(lambda layer, x: layer(x, *args, **kwargs))(layer, x)
    return y, layer.mean[...], layer.var[...]


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("name", NNX_CALLS)
def test_nnx_layers_of_other_classes_match_oracle(name, unbiased, x):
    kind, args, kwargs = NNX_CALLS[name]
    also = [] if kind in (NNXSubclass, NNXGrandchild) else [kind]
    layer = make(kind)
    jaxbn.nnx.replace_batch_norm(layer, also=also, unbiased=unbiased)
    assert isinstance(layer, kind)
    assert isinstance(layer, jaxbn.nnx.BatchNorm)
    got = nnx_step(layer, x, args, kwargs)
    assert_near(got, expected(x, kwargs.get("mask"), unbiased), 1e-3)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("kind", [NNXTrained, NNXSubclass, NNXOwnCall, nnx.BatchNorm])
def test_nnx_restore_goes_back(kind, unbiased, x):
    layer, before = (make(kind) for _ in range(2))
    jaxbn.nnx.replace_batch_norm(
        layer, also=[NNXTrained, NNXOwnCall], unbiased=unbiased, autodiff="jax"
    )
    assert type(layer) is not kind
    restored = jaxbn.nnx.restore_batch_norm(layer)
    assert restored is layer
    assert type(layer) is kind
    assert nnx.graphdef(layer) == nnx.graphdef(before)
    near = x - 1e4
    assert_same(layer(near), before(near), 0)


def test_nnx_subclass_keeps_what_is_its_own(x):
    layer = jaxbn.nnx.replace_batch_norm(make(NNXSubclass))
    assert layer.own == 7
    y, *_ = expected(x)
    assert_near(layer.doubled(x), 2 * y, 1e-3)
    layer.eval()
    assert layer.use_running_average


@pytest.mark.parametrize("kind", [NNXSubclass, NNXTrained])
@pytest.mark.parametrize("unbiased", [False, True])
def test_replaced_nnx_layers_can_be_copied(kind, unbiased, x):
    layer = make(kind)
    jaxbn.nnx.replace_batch_norm(layer, also=[NNXTrained], unbiased=unbiased)
    pickled = pickle.loads(pickle.dumps(layer))
    for other in (nnx.clone(layer), copy.deepcopy(layer), pickled):
        assert type(other) is type(layer)
        assert_near(nnx_step(other, x, (), {}), expected(x, unbiased=unbiased), 1e-3)
    assert type(jaxbn.nnx.restore_batch_norm(pickled)) is kind


def test_nnx_keeps_subclasses_with_a_call_of_their_own(x):
    model = [make(NNXOwnCall), make(nnx.BatchNorm)]
    jaxbn.nnx.replace_batch_norm(model)
    assert type(model[0]) is NNXOwnCall
    assert type(model[1]) is jaxbn.nnx.BatchNorm


@pytest.mark.parametrize("kind", [NNXTrained, NNXMasked, NNXSubclass, NNXOwnCall])
def test_population_measures_replaced_nnx_layers(kind, x):
    layer = make(kind)
    jaxbn.nnx.replace_batch_norm(layer, also=[NNXTrained, NNXMasked, kind])
    jaxbn.nnx.population(layer, [x, 2 * x])
    wide = np.asarray(x, np.float64)
    var = 16 / 15 * (wide.var(0) + 4 * wide.var(0)) / 2
    assert_near((layer.mean[...], layer.var[...]), (1.5 * wide.mean(0), var), 1e-3)


def test_nnx_warns_where_nothing_was_replaced():
    model = nnx.Dict(norms=nnx.List([make(NNXTrained), make(NNXOwnCall)]))
    match = (
        r"replaced nothing.*NNXTrained at 'norms/0', .*NNXOwnCall at 'norms/1'\. "
        r"Pass also=\[NNXTrained, NNXOwnCall\]"
    )
    with pytest.warns(UserWarning, match=match):
        jaxbn.nnx.replace_batch_norm(model)
    with pytest.warns(UserWarning, match="replaced nothing.* in Linear.* none"):
        jaxbn.nnx.replace_batch_norm(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))


def test_nnx_does_not_warn_where_jaxbn_computes():
    with warnings.catch_warnings(action="error"):
        for kind in (nnx.BatchNorm, jaxbn.nnx.BatchNorm, NNXSubclass):
            model = [make(kind), make(NNXOwnCall)]
            jaxbn.nnx.replace_batch_norm(jaxbn.nnx.replace_batch_norm(model))


# Bridges.


class InnerNNX(nnx.Module):
    def __init__(self, kind, rngs):
        self.bn = kind(C, momentum=MOMENTUM, rngs=rngs)

    def __call__(self, x):
        return self.bn(x)


def test_bridges_pass_the_options_on(x):
    want = expected(x, unbiased=True)
    bridge: Any = nnx.bridge.ToNNX(LinenNet(LinenTrained), rngs=nnx.Rngs(0))
    bridge = nnx.bridge.lazy_init(bridge, x, True)
    options: Any = {"also": [LinenTrained, NNXTrained], "unbiased": True}
    jaxbn.nnx.replace_batch_norm(bridge, **options)
    y = bridge(x, True, mutable=["batch_stats"])
    stats = bridge.bn
    assert_near((y, stats["mean"][...], stats["var"][...]), want, 1e-3)
    before = type(jaxbn.nnx.restore_batch_norm(bridge))
    assert before is nnx.bridge.ToNNX
    assert not [name for name in vars(bridge) if name.startswith("to_nnx__unb")]

    net = nnx.bridge.to_linen(InnerNNX, NNXTrained)
    variables = net.init(jax.random.key(0), x)
    with jaxbn.linen.replace_batch_norm(**options) as served:
        y, updates = net.apply(variables, x, mutable=["batch_stats"])
    stats = updates["batch_stats"]["bn"]
    got = (y, *(jax.tree.leaves(stats[name])[0] for name in ("mean", "var")))
    assert_near(got, want, 1e-3)
    assert served == ["bn"]


def test_linen_warns_of_layers_in_bridges(x):
    net = nnx.bridge.to_linen(InnerNNX, NNXTrained)
    variables = net.init(jax.random.key(0), x)
    with (
        pytest.warns(UserWarning, match=r"replaced nothing.*NNXTrained at 'bn'"),
        jaxbn.linen.replace_batch_norm(),
    ):
        net.apply(variables, x, mutable=["batch_stats"])


# Flax's layers and PyTorch's running variance.


def test_unbiased_linen_layers_match_oracle(x):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(False, momentum=MOMENTUM, epsilon=EPSILON, name="bn")(x)

    got, _ = linen_step(Net(), x, (), {}, unbiased=True)
    assert_near(got, expected(x, unbiased=True), 1e-3)


def test_unbiased_nnx_layers_match_oracle(x):
    layer = make(nnx.BatchNorm)
    layer.epsilon = EPSILON
    jaxbn.nnx.replace_batch_norm(layer, unbiased=True)
    assert layer.unbiased
    got = nnx_step(layer, x, (), {})
    assert_near(got, expected(x, unbiased=True), 1e-3)


# One context several times, and contexts in contexts.


class Norm(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(False, momentum=MOMENTUM, epsilon=EPSILON, name="bn")(x)


def step_with(net, variables, x):
    """Return y and the statistics of a step in whatever context is entered."""
    y, updates = net.apply(variables, x, mutable=["batch_stats"])
    stats = updates["batch_stats"]["bn"]
    return y, stats["mean"], stats["var"]


@pytest.fixture
def net_and_step(x) -> Any:
    net = Norm()
    variables = net.init(jax.random.key(0), x)
    return net, jax.jit(lambda x: step_with(net, variables, x))


def far_from(x):
    """Flax's variance cancels, with which a layer outside of all contexts is told."""
    y, _, var = expected(x)
    return lambda got: np.abs(got[2] - var).max() > 0.1 or np.abs(got[0] - y).max() > 1


def test_linen_context_may_be_entered_again(x, net_and_step):
    net, step = net_and_step
    context = jaxbn.linen.replace_batch_norm(unbiased=True)
    for _ in range(2):
        with context as paths:
            assert_near(step(x), expected(x, unbiased=True), 1e-3)
            with context as inner:
                variables = net.init(jax.random.key(0), x)
                y, *_ = step_with(net, variables, x)
                assert inner == ["bn"]
            assert_near(y, expected(x)[0], 1e-3)
            net.apply(variables, x, mutable=["batch_stats"])
            assert paths == ["bn"]
        assert far_from(x)(step(x))


def test_linen_decorator_may_recurse(x, net_and_step):
    net, _ = net_and_step
    variables = net.init(jax.random.key(0), x)

    @jaxbn.linen.replace_batch_norm()
    def run(times):
        if times:
            run(times - 1)
        return step_with(net, variables, x)

    assert_near(run(2), expected(x), 1e-3)
    assert far_from(x)(step_with(net, variables, x))


def test_linen_context_is_left_after_an_error(x, net_and_step):
    _, step = net_and_step
    context = jaxbn.linen.replace_batch_norm()
    with pytest.raises(KeyError), context, context:
        raise KeyError
    assert far_from(x)(step(x))
    with context:
        assert_near(step(x), expected(x), 1e-3)


def test_linen_context_serves_several_threads(x, net_and_step):
    net, _ = net_and_step
    variables = net.init(jax.random.key(0), x)
    context = jaxbn.linen.replace_batch_norm()
    inside, left = threading.Event(), threading.Event()

    def enter_and_leave():
        with context as paths:
            inside.set()
            left.wait(10)
            return step_with(net, variables, x), paths

    with ThreadPoolExecutor(1) as pool:
        with context:
            other = pool.submit(enter_and_leave)
            inside.wait(10)
        assert far_from(x)(step_with(net, variables, x))
        left.set()
        got, paths = other.result()
    assert_near(got, expected(x), 1e-3)
    assert paths == ["bn"]


@pytest.mark.parametrize("kind", [nn.BatchNorm, LinenMasked, "nnx"])
@pytest.mark.parametrize("inner", [True, False])
def test_inner_linen_context_decides(inner, kind, x):
    """Flax calls the interceptors of the outer context first."""
    if kind == "nnx":
        net, args = nnx.bridge.to_linen(InnerNNX, NNXSubclass), ()
    else:
        options = {"momentum": MOMENTUM, "epsilon": EPSILON}
        net, args = LinenNet(partial(kind, **options)), (False,)
    variables = net.init(jax.random.key(0), x, *args)
    replace = partial(jaxbn.linen.replace_batch_norm, also=[LinenMasked])
    with replace(unbiased=not inner) as outer_paths:
        with replace(unbiased=inner) as paths:
            y, updates = net.apply(variables, x, *args, mutable=["batch_stats"])
        assert paths == outer_paths == ["bn"]
        _, after = net.apply(variables, x, *args, mutable=["batch_stats"])

    def var(updates):
        (var,) = jax.tree.leaves(updates["batch_stats"]["bn"]["var"])
        return var

    assert_near((y, var(updates)), expected(x, unbiased=inner)[::2], 1e-3)
    assert_near(var(after), expected(x, unbiased=not inner)[2], 1e-3)


class Outer(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nnx.bridge.ToLinen(NnxOuter)(x)


class NnxOuter(nnx.Module):
    def __init__(self, rngs):
        self.net = InnerNNX(nnx.BatchNorm, rngs)
        self.others = nnx.List([nnx.BatchNorm(C, rngs=rngs)])

    def __call__(self, x):
        return self.others[0](self.net(x))


def test_linen_paths_within_bridges_are_whole(x):
    net = Outer()
    variables = net.init(jax.random.key(0), x)
    with jaxbn.linen.replace_batch_norm() as paths:
        net.apply(variables, x, mutable=["batch_stats"])
    assert sorted(paths) == ["ToLinen_0/net/bn", "ToLinen_0/others/0"]


def test_linen_warning_has_whole_paths_within_bridges(x):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nnx.bridge.to_linen(InnerNNX, NNXTrained, name="net")(x)

    net = Model()
    variables = net.init(jax.random.key(0), x)
    with (
        pytest.warns(UserWarning, match="replaced nothing.*NNXTrained at 'net/bn'"),
        jaxbn.linen.replace_batch_norm(),
    ):
        net.apply(variables, x, mutable=["batch_stats"])


def test_nnx_warning_has_whole_paths(x):
    model = nnx.Dict(blocks=nnx.List([nnx.Dict(inner=make(NNXTrained))]))
    with pytest.warns(UserWarning, match="NNXTrained at 'blocks/0/inner'"):
        jaxbn.nnx.replace_batch_norm(model)


# Errors.


class Spatial(LinenBase):
    @nn.compact
    def __call__(self, x, training, spatial_shape=None):
        return self.normalize(x, not training), spatial_shape


class Renamed(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        gamma = self.param("gamma", nn.initializers.ones, (C,))
        return nn.BatchNorm(not train)(x) * gamma


class NNXRenamed(NNXTrained):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.gamma = nnx.Param(jnp.ones(C))


ALSO: dict[str, tuple[Any, str]] = {
    "a class": (LinenTrained, r"a list of classes; got <class.*also=\["),
    "a number": (3, "a list of classes; got 3"),
    "no layer": ([3], "classes of layers, with a __call__; got 3"),
    "no call": ([NNXBase], "classes of layers, with a __call__; got .*NNXBase"),
    "arguments": ([Spatial], "use_running_average or train.*Spatial, which takes spat"),
}


@pytest.mark.parametrize("case", ALSO)
@pytest.mark.usefixtures("unchecked_types")
def test_also_must_hold_layers_with_flax_s_arguments(case):
    also, match = ALSO[case]
    with pytest.raises(TypeError, match=match):
        jaxbn.linen.replace_batch_norm(also=also)
    layer = make(nnx.BatchNorm)
    with pytest.raises(TypeError, match=match):
        jaxbn.nnx.replace_batch_norm(layer, also=also)
    assert type(layer) is nnx.BatchNorm


def test_also_must_hold_layers_with_flax_s_variables(x):
    net = LinenNet(Renamed)
    variables = net.init(jax.random.key(0), x)
    match = "must have the variables of Flax's BatchNorm, .*; got Renamed with"
    with (
        pytest.raises(TypeError, match=match),
        jaxbn.linen.replace_batch_norm(also=[Renamed]),
    ):
        net.apply(variables, x, mutable=["batch_stats"])
    model = [make(nnx.BatchNorm), make(NNXRenamed)]
    with pytest.raises(TypeError, match="got NNXRenamed with bias, gamma, mean, scale"):
        jaxbn.nnx.replace_batch_norm(model, also=[NNXRenamed])
    assert type(model[0]) is nnx.BatchNorm
