"""Compare runs of the multi-process example with faults to a run without faults.

Every run uses real processes, started by the launcher of the example.
"""

import importlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPT = EXAMPLES / "train_multiprocess.py"
PROCESSES, BATCH, ROWS, STEPS = 2, 16, 200, 12
# The checkpoint after the first padded batches. Later, rounding may change the sign of
# a ReLU's input, and with it a gradient by more than any rounding.
COMPARED = 8
TINY = (f"--processes={PROCESSES}", f"--batch={BATCH}", f"--examples={ROWS}")
RUN = f"checkpoints/seed0-{PROCESSES}x{BATCH}-of-{ROWS}"


def command(output, *flags, steps=STEPS) -> list[str]:
    start = [sys.executable, str(SCRIPT), f"--output={output}", *TINY]
    return [*start, f"--steps={steps}", "--checkpoint-every=4", *flags]


def options(output) -> dict:
    # Most of the time goes to starting, so all runs share one compilation cache.
    cache = {"JAX_COMPILATION_CACHE_DIR": str(output.parent / "compiled")}
    cache |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return {"env": os.environ | cache, "text": True}


def run(output, *flags, steps=STEPS) -> subprocess.CompletedProcess:
    flagged = command(output, *flags, steps=steps)
    return subprocess.run(flagged, capture_output=True, timeout=400, **options(output))


def final(output) -> dict:
    with np.load(output / "train_multiprocess.npz") as file:
        return dict(file)


def restore(output, step, like):
    """Return the checkpoint of a step, as a state on this process's devices."""
    with ocp.CheckpointManager(output / RUN) as manager:
        return manager.restore(step, args=ocp.args.StandardRestore(like))


def assert_identical(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for name, a in expected.items():
        np.testing.assert_array_equal(actual[name], a, err_msg=name, strict=True)


def processes_with(text) -> list[str]:
    """Return the command lines that contain the text."""
    ps = subprocess.run(["ps", "-A", "-ww", "-o", "args"], stdout=-1, text=True)
    return [line for line in ps.stdout.splitlines() if str(text) in line]


def wait_until(condition, timeout=60.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def undisturbed_output(tmp_path_factory) -> Path:
    """Run without faults; each worker starts as on its own host."""
    output = tmp_path_factory.mktemp("undisturbed")
    with socket.create_server(("localhost", 0)) as server:
        coordinator = f"--coordinator=localhost:{server.getsockname()[1]}"
    workers = [
        subprocess.Popen(
            command(output, coordinator, f"--process-id={i}"), **options(output)
        )
        for i in range(PROCESSES)
    ]
    try:
        assert [worker.wait(400) for worker in workers] == [0] * PROCESSES
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    return output


@pytest.fixture(scope="module")
def undisturbed(undisturbed_output) -> dict:
    """Return the result without faults."""
    return final(undisturbed_output)


@pytest.fixture
def example(monkeypatch) -> Any:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module(SCRIPT.stem)


@pytest.mark.parametrize(
    ("killed_after", "resumed"), [(6, "Resuming from step 4."), (2, None)]
)
def test_killed_worker_does_not_change_the_result(
    killed_after, resumed, undisturbed, tmp_path
):
    """A run that is killed before its first checkpoint starts from step 0."""
    done = run(tmp_path, f"--kill-after={killed_after}")
    assert done.returncode == 0, done.stderr
    first, again = done.stdout.split("Launcher: worker 1 was killed by SIGKILL")
    assert "Starting from step 0." in first
    assert (resumed or "Starting from step 0.") in again
    assert_identical(final(tmp_path), undisturbed)
    assert not processes_with(tmp_path)


def test_half_written_checkpoint_is_skipped(undisturbed, tmp_path):
    """One checkpoint is truncated; another remains of an interrupted save."""
    assert run(tmp_path, steps=8).returncode == 0
    checkpoints = tmp_path / RUN
    truncate(max((checkpoints / "8").rglob("*"), key=lambda file: file.stat().st_size))
    (checkpoints / "12.orbax-checkpoint-tmp" / "default").mkdir(parents=True)
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"Skipped unreadable checkpoint {checkpoints / '8'}:" in done.stderr
    assert "Resuming from step 4." in done.stdout
    assert_identical(final(tmp_path), undisturbed)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["12", "4", "8"]


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


# Run alone, because after one failed read Orbax reports others at random.
TRUNCATE_EACH = """
import os, shutil, sys, warnings
from pathlib import Path
import jax, numpy as np, orbax.checkpoint as ocp
import train_multiprocess as example
old = jax.jit(example.create)(jax.random.key(0))
new = jax.tree.map(lambda a: a + 1, old)
directory = Path(sys.argv[1], "checkpoints")
newest, intact = directory / "1", directory.with_name("intact")
with ocp.CheckpointManager(directory) as manager:
    example.save(manager, old)
    example.save(manager, new)
    manager.wait_until_finished()
    shutil.copytree(newest, intact)
    for file in filter(Path.is_file, intact.rglob("*")):
        name = file.relative_to(intact)
        shutil.copytree(intact, newest, dirs_exist_ok=True)
        os.truncate(newest / name, file.stat().st_size // 2)
        with warnings.catch_warnings(record=True, action="always") as caught:
            restored = example.restore_newest(manager, old)
        expected = old if caught else new
        assert jax.tree.all(jax.tree.map(np.array_equal, restored, expected)), name
        print("skipped" if caught else "restored", name)
"""


def test_restore_returns_no_wrong_state_from_truncated_files(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", TRUNCATE_EACH, tmp_path],
        cwd=EXAMPLES,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "skipped default/d/" in done.stdout
    assert "skipped default/manifest.ocdbt" in done.stdout


def test_uneven_last_batches_are_masked_not_dropped(
    example, undisturbed, undisturbed_output
):
    """Two processes equal one process that gets only the valid rows, unpadded."""
    shards = example.load_digits(example.split(0, ROWS, PROCESSES)[1:])
    sizes = [len(labels) for _, labels in shards]
    steps_per_epoch = -(-max(sizes) // BATCH)
    assert len(set(sizes)) == PROCESSES
    assert all(size % BATCH for size in sizes)
    assert steps_per_epoch < COMPARED < STEPS

    mesh = Mesh(jax.devices()[:1], ("data",))
    specs = {"in_specs": (P(), *[P("data")] * 3), "out_specs": P()}
    step_alone = jax.jit(jax.shard_map(example.train_step, mesh=mesh, **specs))
    state, seen, states = jax.jit(example.create)(jax.random.key(0)), 0, []
    for step in range(STEPS):
        at = (step, steps_per_epoch, BATCH, 0)
        parts = [example.batch_at(shard, *at) for shard in shards]
        valid = [[a[part[-1] == 1] for a in part] for part in parts]
        state, _ = step_alone(state, *map(np.concatenate, zip(*valid, strict=True)))
        seen += sum(len(rows[0]) for rows in valid)
        assert seen == ROWS or step + 1 != steps_per_epoch
        states.append(state)
    assert undisturbed["seen"] == seen
    alone = states[COMPARED - 1]
    together = restore(undisturbed_output, COMPARED, alone)
    alone, together = (
        flatten_dict({"params": s.params, "batch_stats": s.batch_stats}, sep="/")
        for s in (alone, together)
    )
    for name, a in alone.items():
        close = {"rtol": 2e-5, "atol": 2e-5, "err_msg": name}
        np.testing.assert_allclose(together[name], np.asarray(a), **close)


def test_epoch_contains_each_row_once(example):
    rows, steps_per_epoch, orders = np.arange(50), 7, []
    for epoch in range(2):
        steps = range(epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch)
        parts = [
            example.batch_at((rows, rows), s, steps_per_epoch, 8, 0) for s in steps
        ]
        orders.append(np.concatenate([a[valid == 1] for a, _, valid in parts]))
        np.testing.assert_array_equal(np.sort(orders[-1]), rows)
    assert (orders[0] != orders[1]).any()


WORKER = """
import os, pathlib, signal, sys, time
from _launch import end_with
launcher, folder, *deaf = sys.argv[1:]
if deaf:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
end_with(int(launcher))
pathlib.Path(folder, str(os.getpid())).touch()
time.sleep(600)
"""
LAUNCHER = """
import os, sys
from _launch import launch
worker = [sys.executable, "-c", sys.argv[1], str(os.getpid())]
launch(lambda attempt: [[*worker, *sys.argv[2:]]] * 2, restarts=0)
"""


def test_launcher_gives_up_after_its_restarts():
    """One worker fails at each attempt, while the others would wait for it."""
    fails = 'import sys, time; "1" in sys.argv and sys.exit(3); time.sleep(600)'
    launcher = f"""
import sys
from _launch import launch
worker = [sys.executable, "-c", {fails!r}]
launch(lambda attempt: [[*worker, str(i)] for i in range(3)], restarts=2)
"""
    done = subprocess.run(
        [sys.executable, "-c", launcher], cwd=EXAMPLES, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stdout.count("Launcher: worker 1 exited with status 3;") == 3
    assert "Launcher: restart 2 of 2." in done.stdout
    assert "Launcher: gave up after 2 restarts." in done.stderr


@pytest.mark.parametrize("end", ["SIGINT", "SIGTERM", "SIGTERM deaf", "SIGKILL deaf"])
def test_workers_end_with_their_launcher(end, tmp_path):
    name, *deaf = end.split()
    start = [sys.executable, "-c", LAUNCHER, WORKER, str(tmp_path), *deaf]
    with subprocess.Popen(start, cwd=EXAMPLES, stderr=subprocess.DEVNULL) as launcher:
        wait_until(lambda: len([*tmp_path.iterdir()]) == 2)
        launcher.send_signal(number := signal.Signals[name])
        expected = -number if number == signal.SIGKILL else 128 + number
        assert launcher.wait(60) == expected
    wait_until(lambda: not processes_with(tmp_path))
