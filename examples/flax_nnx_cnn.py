"""Train a small CNN in flax.nnx, with jaxbn's batch norm or with Flax's.

--norm selects the class; variables, initial weights and batches stay the same.
"""

import itertools

import optax
from _digits import load_digits, random_batches
from _training import make_parser, report
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

import jaxbn.nnx


class CNN(nnx.Module):
    """Blocks of convolution, batch norm and ReLU; the mean, the logits."""

    def __init__(
        self,
        norm: type[nnx.BatchNorm],
        rngs: nnx.Rngs,
        widths: tuple[int, ...] = (1, 16, 32, 32, 64, 64),
    ):
        layers = []
        for i, (n_in, n_out) in enumerate(itertools.pairwise(widths)):
            stride = 1 + i % 2
            conv = nnx.Conv(n_in, n_out, (3, 3), stride, use_bias=False, rngs=rngs)
            layers += [conv, norm(n_out, momentum=0.9, rngs=rngs), nnx.relu]
        self.layers = nnx.Sequential(*layers)
        self.head = nnx.Linear(widths[-1], 10, rngs=rngs)

    def __call__(self, x: ArrayLike) -> Array:
        """Map NHWC images to logits."""
        return self.head(self.layers(x).mean((1, 2)))


def loss(model: CNN, images: ArrayLike, labels: ArrayLike) -> Array:
    """Compute the mean cross-entropy."""
    logits = model(images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@nnx.jit
def train_step(model: CNN, optimizer: nnx.Optimizer, *batch: ArrayLike) -> Array:
    """Update model and optimizer in place by one step; return the loss."""
    cost, grads = nnx.value_and_grad(loss)(model, *batch)
    optimizer.update(model, grads)
    return cost


@nnx.jit
def accuracy(model: CNN, images: ArrayLike, labels: ArrayLike) -> Array:
    """Return the share of digits recognized."""
    return (model(images).argmax(-1) == labels).mean()


def fit(norm: type[nnx.BatchNorm], seed: int, steps: int) -> tuple:
    """Train once; return the model, losses, and accuracies by step."""
    test, train = load_digits(seed)
    losses, accuracies = [], {}
    model, rate = CNN(norm, nnx.Rngs(seed)), optax.cosine_decay_schedule(0.2, steps)
    optimizer = nnx.Optimizer(model, optax.sgd(rate, momentum=0.9), wrt=nnx.Param)
    for step, batch in random_batches(train, seed, steps):
        model.train()  # the statistics of this batch
        losses.append(float(train_step(model, optimizer, *batch)))
        if step % 20 == 0:
            model.eval()  # the running statistics
            accuracies[step] = float(accuracy(model, *test))
    return model, losses, accuracies


def main() -> None:
    """Train once; print a table and write a picture."""
    parser = make_parser(__doc__, quick="train 60 steps instead of 400")
    shown = "library of the batch norm (default: jaxbn)"
    parser.add_argument(
        "--norm", choices=("flax", "jaxbn"), default="jaxbn", help=shown
    )
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    norm = {"flax": nnx.BatchNorm, "jaxbn": jaxbn.nnx.BatchNorm}[args.norm]
    model, losses, accuracies = fit(norm, args.seed, 60 if args.quick else 400)
    name = f"flax_nnx_cnn-{args.norm}"
    arrays = {
        kind.__name__: nnx.to_flat_state(nnx.state(model, kind))
        for kind in (nnx.BatchStat, nnx.Param)
    }
    report(name, arrays, losses, accuracies, args.output)


if __name__ == "__main__":
    main()
