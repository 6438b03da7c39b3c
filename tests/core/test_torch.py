"""Compare `batch_norm` with the layers of PyTorch, option by option."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_near

import jaxbn
from jaxbn import convert

torch: Any = pytest.importorskip("torch")

C = 3
SHAPES = {"1d flat": (6, C), "1d": (4, C, 5), "2d": (4, C, 2, 3), "3d": (2, C, 2, 3, 2)}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_layer(rng, kind, **options):
    layer = getattr(torch.nn, f"BatchNorm{kind[:2]}")(C, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.tensor(rng.normal(size=C)))
    return layer


def torch_step(layer, x, dy):
    """Return y and the gradients of x, weight and bias."""
    x = torch.tensor(x, requires_grad=True)
    layer.zero_grad()
    y = layer(x)
    y.backward(torch.tensor(dy))
    gradients = [parameter.grad.numpy() for parameter in layer.parameters()]
    return y.detach().numpy(), x.grad.numpy(), gradients


@partial(jax.jit, static_argnames=("train", "momentum"))
def jaxbn_step(params, state, x, dy, train, momentum):
    def call(params, x):
        return jaxbn.batch_norm(params, state, x, train, axis=1, momentum=momentum)

    y, vjp, state = jax.vjp(call, params, x, has_aux=True)
    dparams, dx = vjp(dy)
    return (y, dx, jax.tree.leaves(dparams)), state


OPTIONS = [
    (kind, momentum, affine, track)
    for kind in ("1d", "2d", "3d")
    for momentum in (0.1, None)
    for affine in (True, False)
    for track in (True, False)
]


@pytest.mark.parametrize(
    ("kind", "momentum", "affine", "track"), [*OPTIONS, ("1d flat", 0.1, True, True)]
)
def test_batch_norm_matches_torch_layers(kind, momentum, affine, track, rng):
    """y, gradients and statistics of three training steps and inference agree."""
    layer = make_layer(
        rng, kind, momentum=momentum, affine=affine, track_running_stats=track
    )
    if track:
        params, state = convert.from_torch(layer.state_dict())
    else:  # without running statistics, both modes are train=True and drop the state
        params, state = jaxbn.init(C)
        vectors = (jnp.array(p.detach().numpy()) for p in layer.parameters())
        params = jaxbn.BatchNormParams(*(vectors if affine else (None, None)))
    assert (params.scale is None) == (not affine)
    for train in (True, True, True, False):
        layer.train(train)
        x = (0.7 + 1.9 * rng.normal(size=SHAPES[kind])).astype(np.float32)
        dy = rng.normal(size=x.shape).astype(np.float32)
        expected = torch_step(layer, x, dy)
        mode = train or not track
        keep = convert.torch_momentum(momentum) if mode else 0.99  # 0.99 is not used
        actual, new_state = jaxbn_step(params, state, x, dy, mode, keep)
        assert_near(actual, expected, 2e-5)
        state = new_state if track else state
        if track:
            assert_near(state.mean, layer.running_mean.numpy(), 2e-5)
            assert_near(state.var, layer.running_var.numpy(), 2e-5)
            assert int(state.count) == int(layer.num_batches_tracked)


def test_from_torch_copies_the_statistics(rng):
    """PyTorch updates its buffers in place, which NumPy views would show."""
    layer = make_layer(rng, "2d")
    x = torch.tensor(rng.normal(size=SHAPES["2d"]).astype(np.float32))
    layer(x)
    params, state = convert.from_torch(layer.state_dict())
    before = jax.tree.map(np.array, (params, state))
    layer(x)
    with torch.no_grad():
        layer.weight.zero_()
    jax.tree.map(np.testing.assert_array_equal, before, (params, state))
    assert not np.array_equal(state.mean, layer.running_mean.numpy())


def test_to_torch_tree_keeps_dtypes_and_loads_strictly(rng):
    net = torch.nn.Sequential(
        torch.nn.Conv2d(2, C, 1), make_layer(rng, "2d"), torch.nn.LayerNorm(3)
    )
    net[1].double()
    ones = np.ones(C, np.float32)
    half = jnp.full(C, 0.5, jnp.bfloat16)
    variables = {
        "params": {"norm": {"scale": half, "bias": ones}},
        "batch_stats": {"norm": {"mean": ones, "var": 2 * ones, "count": np.int32(5)}},
    }
    old = net.state_dict()
    new = convert.to_torch_tree(variables, {"1": "norm"}, old)
    assert {k: v.dtype for k, v in new.items()} == {k: v.dtype for k, v in old.items()}
    net.load_state_dict(new)
    assert int(net[1].num_batches_tracked) == 5
    assert net[1].running_var.tolist() == [2.0] * C
    assert net[1].weight.tolist() == [0.5] * C
    read: Any = convert.from_torch_tree(net.state_dict(), {"1": "norm"}, variables)
    jax.tree.map(np.testing.assert_array_equal, read, variables)


@pytest.mark.parametrize("make", [lambda t: t.bfloat16(), lambda t: t.requires_grad_()])
def test_from_torch_rejects_tensors_unreadable_by_numpy(make, rng):
    state_dict = make_layer(rng, "1d").state_dict()
    state_dict["running_mean"] = make(state_dict["running_mean"])
    with pytest.raises(TypeError, match=r"readable as a NumPy array; got Tensor"):
        convert.from_torch(state_dict)
