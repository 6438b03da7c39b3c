"""Train a small ResNet in flax.linen, with jaxbn's batch norm or with Flax's.

--norm selects the class; variables, initial weights and batches stay the same.
"""

from functools import partial

import flax.linen as nn
import jax
import optax
from _digits import load_digits, random_batches
from _training import make_parser, report
from flax.training.train_state import TrainState
from flax.traverse_util import flatten_dict
from jax import Array

import jaxbn.linen


class Block(nn.Module):
    """Two convolutions and a shortcut, projected where the shape changes."""

    norm: type[nn.BatchNorm]
    width: int
    stride: int

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Transform features; `train` normalizes with the statistics of this batch."""
        norm = partial(self.norm, use_running_average=not train, momentum=0.9)
        conv = partial(nn.Conv, self.width, use_bias=False)
        y = nn.relu(norm()(conv((3, 3), self.stride)(x)))
        y = norm()(conv((3, 3))(y))
        if x.shape != y.shape:
            x = norm()(conv((1, 1), self.stride)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A convolution, three blocks of decreasing resolution, the mean, the logits."""

    norm: type[nn.BatchNorm]

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """Map NHWC images to logits; without `train`, with the running statistics."""
        x = nn.Conv(16, (3, 3), use_bias=False)(x)
        x = nn.relu(self.norm(use_running_average=not train, momentum=0.9)(x))
        for width, stride in ((16, 1), (32, 2), (64, 2)):
            x = Block(self.norm, width, stride)(x, train)
        return nn.Dense(10)(x.mean((1, 2)))


class State(TrainState):
    """Parameters, optimizer state and running statistics."""

    batch_stats: dict


@jax.jit
def train_step(state: State, images: Array, labels: Array) -> tuple[State, Array]:
    """Take one training step; return the new state and the loss."""

    def loss(params: dict) -> tuple[Array, dict]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, new = state.apply_fn(variables, images, True, mutable="batch_stats")
        costs = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return costs.mean(), new["batch_stats"]

    (cost, stats), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, batch_stats=stats), cost


@jax.jit
def accuracy(state: State, images: Array, labels: Array) -> Array:
    """Return the share of digits recognized, with the running statistics."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return (state.apply_fn(variables, images).argmax(-1) == labels).mean()


def fit(norm: type[nn.BatchNorm], seed: int, steps: int) -> tuple:
    """Train once; return the initial variables, losses, and accuracies by step."""
    test, train = load_digits(seed)
    losses, accuracies = [], {}
    model, rate = ResNet(norm), optax.cosine_decay_schedule(0.3, steps)
    key = jax.random.key(seed, impl="rbg")  # compiles faster than the default
    start = jax.jit(model.init)(key, test[0][:1])
    state = State.create(apply_fn=model.apply, tx=optax.sgd(rate, 0.9), **start)
    for step, (images, labels) in random_batches(train, seed, steps):
        state, cost = train_step(state, images, labels)
        losses.append(float(cost))
        if step % 20 == 0:
            accuracies[step] = float(accuracy(state, *test))
    return start, losses, accuracies


def main() -> None:
    """Train once; print a table and write a picture."""
    parser = make_parser(__doc__, quick="train 40 steps instead of 300")
    shown = "library of the batch norm (default: jaxbn)"
    parser.add_argument(
        "--norm", choices=("flax", "jaxbn"), default="jaxbn", help=shown
    )
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    norm = {"flax": nn.BatchNorm, "jaxbn": jaxbn.linen.BatchNorm}[args.norm]
    start, losses, accuracies = fit(norm, args.seed, 40 if args.quick else 300)
    name = f"flax_linen_resnet-{args.norm}"
    arrays = {kind: flatten_dict(tree).items() for kind, tree in start.items()}
    report(name, arrays, losses, accuracies, args.output)


if __name__ == "__main__":
    main()
