"""Small random networks in linen and nnx, for which folding must change nothing.

All arrays have shape (3, 3, 3), so that no size tells one axis from another.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

import jaxbn

SHAPE = (3, 3, 3)
C = 3
NOTHING: Any = None


class Step(NamedTuple):
    """An operation: the numbers of its module and inputs, its kind and options."""

    kind: str
    module: int = -1
    inputs: tuple[int, ...] = ()
    lift: str = "plain"
    axis: int = 0
    options: tuple[tuple[str, Any], ...] = ()


LAYERS = {"dense": 5, "general": 1, "pointwise": 1, "circular": 1, "padded": 1}
LAYERS |= {"depthwise": 1, "transposed": 1, "standardized": 1}
OTHERS = {"relu": 2, "add": 2, "square": 1, "jit": 1}
LIFTS = {"plain": 28, "vmap": 4, "stacked": 6, "scan": 3, "cond": 1, "remat": 4}


def choose(rng, weights):
    names, counts = zip(*weights.items(), strict=True)
    return str(rng.choice(names, p=[c / sum(counts) for c in counts]))


def draw_steps(rng) -> list[Step]:
    """Draw a network whose layers and norms often follow each other."""
    steps: list[Step] = []
    expects = str(rng.choice(["layer", "norm"]))
    for _ in range(rng.integers(3, 7)):
        kind = expects if rng.random() < 0.75 else choose(rng, OTHERS)
        steps.append(draw_step(rng, kind, steps))
        if kind in ("layer", "norm"):
            expects = "norm" if kind == "layer" else "layer"
    return steps


def draw_step(rng, kind: str, steps: list[Step]) -> Step:
    last, count = len(steps), 2 if kind == "add" else 1
    inputs = [last if rng.random() < 0.9 else rng.integers(last + 1)]
    inputs += [rng.integers(last + 1) for _ in range(count - 1)]
    step = Step(kind, inputs=tuple(map(int, inputs)))
    if kind not in ("layer", "norm"):
        return step
    previous = steps[-1] if steps else step
    same = previous.kind in ("layer", "norm") and rng.random() < 0.8
    lift = previous.lift if same else choose(rng, LIFTS)
    axis = previous.axis if same and rng.random() < 0.8 else int(rng.integers(3))
    known = [s for s in steps if s.kind == kind]
    if known and rng.random() < 0.1:
        known = known[rng.integers(len(known))]
        return known._replace(inputs=step.inputs)
    options = draw_layer(rng) if kind == "layer" else draw_norm(rng)
    return step._replace(module=last, lift=lift, axis=axis, options=options)


def draw_layer(rng):
    dtype = jnp.bfloat16 if rng.random() < 0.05 else None
    param_dtype = jnp.bfloat16 if rng.random() < 0.05 else jnp.float32
    layer, use_bias = choose(rng, LAYERS), bool(rng.random() < 0.5)
    return (
        *(("layer", layer), ("use_bias", use_bias)),
        *(("dtype", dtype), ("param_dtype", param_dtype)),
    )


def draw_norm(rng):
    dtype = jnp.bfloat16 if rng.random() < 0.05 else None
    return (
        ("ours", bool(rng.random() < 0.5)),
        ("custom", bool(rng.random() < 0.05)),
        ("axis", int(rng.choice([-1, 0], p=[0.85, 0.15]))),
        ("use_scale", bool(rng.random() < 0.8)),
        ("use_bias", bool(rng.random() < 0.8)),
        ("epsilon", float(rng.choice([1e-5, 1e-3, 0.1]))),
        *(("dtype", dtype), ("param_dtype", jnp.float32)),
    )


def is_exact(steps: list[Step]) -> bool:
    """Return whether a network computes in float32 everywhere."""
    return not any(jnp.bfloat16 in dict(step.options).values() for step in steps)


def apply_other(kind: str, values: list[jax.Array]) -> jax.Array:
    first = values[0]
    match kind:
        case "relu":
            return jax.nn.relu(first)
        case "square":
            return jnp.sin(first)
        case "jit":
            return jax.jit(lambda x: x)(first)
        case _:
            return sum(values[1:], first)


# linen.


class StandardDense(nn.Dense):
    def param(self, name, *args, **kwargs):
        value = super().param(name, *args, **kwargs)
        return value / (1 + jnp.abs(value).sum()) if name == "kernel" else value


class OffsetNorm(nn.BatchNorm):
    def param(self, name, *args, **kwargs):
        return 1 + super().param(name, *args, **kwargs)


LINEN: dict[str, Any] = {
    "dense": (nn.Dense, (C,), {}),
    "general": (nn.DenseGeneral, (C,), {}),
    "pointwise": (nn.Conv, (C, (1,)), {}),
    "circular": (nn.Conv, (C, (2,)), {"padding": "CIRCULAR"}),
    "padded": (nn.Conv, (C, (2,)), {}),
    "depthwise": (nn.Conv, (C, (2,)), {"feature_group_count": C, "padding": "REFLECT"}),
    "transposed": (nn.ConvTranspose, (C, (2,)), {}),
    "standardized": (StandardDense, (C,), {}),
}


def make_linen(step: Step, lift, name: str) -> nn.Module:
    options = dict(step.options)
    if step.kind == "layer":
        kind, args, more = LINEN[options.pop("layer")]
        return lift(kind)(*args, **more, **options, name=name)
    ours, custom = options.pop("ours"), options.pop("custom")
    kind: Any = jaxbn.linen.BatchNorm if ours else nn.BatchNorm
    return lift(OffsetNorm if custom else kind)(True, **options, name=name)


def lift_linen(step: Step) -> Any:
    stacked: Any = {"params": 0, "batch_stats": 0}
    shared: Any = {"params": NOTHING, "batch_stats": NOTHING}
    axis = step.axis - 3 * (step.axis == 2)
    match step.lift:
        case "vmap" | "stacked":
            axes = stacked if step.lift == "stacked" else shared
            return lambda kind: nn.vmap(
                kind,
                in_axes=axis,
                out_axes=axis,
                variable_axes=axes,
                split_rngs={"params": step.lift == "stacked"},
            )
        case "remat":
            return nn.remat
        case _:
            return lambda kind: kind


class Loop(nn.Module):
    """Apply layers and norms of a loop, each as `step` describes."""

    steps: tuple[Step, ...]

    @nn.compact
    def __call__(self, x, _=None):
        y = x
        for i, step in enumerate(self.steps):
            y = make_linen(step, lambda kind: kind, f"{step.kind}_{i}")(y)
        return y.astype(x.dtype), None


class LinenNetwork(nn.Module):
    steps: tuple[Step, ...]

    @nn.compact
    def __call__(self, x):
        values, modules = [x], {}
        for step in self.steps:
            given = [values[i] for i in step.inputs]
            if step.kind not in ("layer", "norm"):
                values.append(apply_other(step.kind, given))
                continue
            if step.module not in modules:
                modules[step.module] = self.make(step)
            values.append(self.call(modules[step.module], step, given[0]))
        return values[-1], sum(values[:-1:3], values[0])

    def make(self, step: Step) -> Any:
        name = f"{step.kind}_{step.module}"
        if step.lift != "scan":
            return make_linen(step, lift_linen(step), name)
        loop: Any = nn.scan(
            Loop,
            length=3,
            variable_axes={"params": step.axis % 2, "batch_stats": 0},
            split_rngs={"params": True},
        )
        norm = next((s for s in self.steps if s.kind == "norm"), None)
        both = (step, norm) if norm is not None and step.kind == "layer" else (step,)
        return loop(tuple(both[:: 1 if step.axis else -1]), name=f"loop_{step.module}")

    def call(self, module, step: Step, x):
        if step.lift == "scan":
            return module(x, None)[0]
        if step.lift != "cond" or self.is_initializing():
            return module(x)
        dtype = jax.eval_shape(module.clone(parent=None).apply, module.variables, x)
        return nn.cond(
            x.sum() > 0,
            lambda module, x: module(x),
            lambda module, x: x.astype(dtype.dtype),
            module,
            x,
        )


# nnx.


class NNXStandard(nnx.Linear):
    def __getattribute__(self, name):
        value = super().__getattribute__(name)
        return nnx.Param(2 * value[...]) if name == "kernel" else value


class NNXOffset(nnx.BatchNorm):
    def __getattribute__(self, name):
        value = super().__getattribute__(name)
        is_mean = name == "mean"
        return nnx.BatchStat(1 + value[...]) if is_mean else value


NNX: dict[str, Any] = {
    "dense": (nnx.Linear, (), {}),
    "general": (nnx.LinearGeneral, (), {}),
    "pointwise": (nnx.Conv, ((1,),), {}),
    "circular": (nnx.Conv, ((2,),), {"padding": "CIRCULAR"}),
    "padded": (nnx.Conv, ((2,),), {}),
    "depthwise": (
        nnx.Conv, ((2,),), {"feature_group_count": C, "padding": "REFLECT"}
    ),
    "transposed": (nnx.ConvTranspose, ((2,),), {}),
    "standardized": (NNXStandard, (), {}),
}  # fmt: skip


def make_nnx(step: Step, rngs) -> nnx.Module:
    options = dict(step.options)
    if step.kind == "layer":
        kind, args, more = NNX[options.pop("layer")]
        return kind(C, C, *args, **more, **options, rngs=rngs)
    ours, custom = options.pop("ours"), options.pop("custom")
    kind: Any = jaxbn.nnx.BatchNorm if ours else nnx.BatchNorm
    return (NNXOffset if custom else kind)(C, **options, rngs=rngs)


class NNXNetwork(nnx.Module):
    def __init__(self, steps, rngs):
        self.steps = steps
        for step in steps:
            if step.module >= 0 and not hasattr(self, f"{step.kind}_{step.module}"):
                setattr(self, f"{step.kind}_{step.module}", make_stack(step, rngs))

    def __call__(self, x):
        values = [x]
        for step in self.steps:
            given = [values[i] for i in step.inputs]
            if step.kind in ("layer", "norm"):
                module = getattr(self, f"{step.kind}_{step.module}")
                values.append(call_nnx(module, step, given[0]))
            else:
                values.append(apply_other(step.kind, given))
        return values[-1], sum(values[:-1:3], values[0])


class NNXLoop(nnx.Module):
    """A layer and a norm of a loop."""

    def __init__(self, step, rngs):
        self.layer = make_nnx(step, rngs) if step.kind == "layer" else None
        norm = step if step.kind == "norm" else NORM
        self.norm, self.after = make_nnx(norm, rngs), bool(step.axis)

    def __call__(self, x):
        parts = [part for part in (self.layer, self.norm) if part is not None]
        y = x
        for part in parts[:: 1 if self.after else -1]:
            y = part(y)
        return y.astype(x.dtype)


NORM = Step(
    "norm",
    options=(
        *(("ours", False), ("custom", False), ("axis", -1)),
        *(("use_scale", True), ("use_bias", True), ("epsilon", 1e-3)),
        *(("dtype", None), ("param_dtype", jnp.float32)),
    ),
)


def make_stack(step: Step, rngs) -> nnx.Module:
    kind = NNXLoop if step.lift == "scan" else make_nnx
    if step.lift not in ("stacked", "scan"):
        return kind(step, rngs)

    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make(rngs):
        return kind(step, rngs)

    return make(rngs)


def call_nnx(module, step: Step, x):
    axis = step.axis - 3 * (step.axis == 2)
    match step.lift:
        case "vmap":
            return jax.vmap(module, axis, axis)(x)
        case "stacked":
            call = nnx.vmap(lambda m, x: m(x), in_axes=(0, axis), out_axes=axis)
            return call(module, x)
        case "scan":
            axes = nnx.Carry, 0
            loop = nnx.scan(lambda x, m: m(x), in_axes=axes, out_axes=nnx.Carry)
            return loop(x, module)
        case "cond":
            like = jax.eval_shape(module, x)
            return nnx.cond(
                x.sum() > 0, lambda m, x: m(x), lambda m, x: x.astype(like.dtype),
                module, x,
            )  # fmt: skip
        case "remat":
            return nnx.remat(lambda m, x: m(x))(module, x)
        case _:
            return module(x)
