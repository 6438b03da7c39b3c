"""The parts of the benchmarks: arithmetic, checks, files; no test depends on time."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import Case, train_step

from benchmarks import (
    _compile,
    _devices,
    _drift,
    _ensemble,
    _layers,
    _libraries,
    _masks,
    _programs,
    _report,
    _task,
    _timing,
    accelerator,
)
from benchmarks.__main__ import parse_arguments
from benchmarks._shapes import ALL, Shape
from benchmarks._torch import Torch

pytestmark = pytest.mark.usefixtures("standard_promotion", "any_rank")


SMALL = Shape("", (16, 3, 2, 5))


def some_task(rng, shape=SMALL, **options):
    return _task.random_task(rng, shape, "float32", **options)


def test_floor_of_8_passes_is_4_copies():
    """A copy makes two passes: one reads, one writes."""
    assert _timing.floor(0.5, 8) == 4 * 0.5
    assert _layers.PASSES["forward"] + _layers.PASSES["backward"] == 8


def test_interleave_runs_every_case_once_per_round(rng):
    order = []
    cases = {name: lambda name=name: order.append(name) or 1.0 for name in "abc"}
    samples = _timing.interleave(cases, 5, rng)
    assert samples == {name: [1.0] * 5 for name in "abc"}
    rounds = ["".join(sorted(order[i : i + 3])) for i in range(0, 15, 3)]
    assert rounds == ["abc"] * 5
    assert len({tuple(order[i : i + 3]) for i in range(0, 15, 3)}) > 1


def test_interleave_stops_at_limit_after_three_rounds(rng):
    samples = _timing.interleave({"a": lambda: 1.0}, 50, rng, limit=0)
    assert len(samples["a"]) == 3


def test_summarize_returns_median_and_quartiles():
    assert _timing.summarize([9.0, 1.0, 3.0, 2.0, 4.0]) == (3.0, 2.0, 4.0)


def test_geometric_mean_cancels_ratio_and_inverse():
    assert math.isclose(_timing.geometric_mean([4.0, 0.25, 8.0]), 2.0)


def test_split_outputs_excludes_forwarded_inputs_and_repeats():
    def function(x, y):
        total = x + y
        return x, total, y, total, x * y

    jaxpr = jax.make_jaxpr(function)(1.0, 2.0).jaxpr
    assert _programs.split_outputs(jaxpr) == ([1, 4], [0, 2, 1, 2, 3])


def test_program_donates_outputs_and_keeps_inputs(rng):
    x = jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)
    program = _programs.Program(lambda x: {"x": x, "y": 2 * x}, x)
    for _ in range(2):
        program()
    result = program.result()
    assert result["x"] is x
    np.testing.assert_array_equal(result["y"], 2 * np.asarray(x))
    program()
    assert result["y"].is_deleted()
    program.set_inputs(x + 1)
    program()
    np.testing.assert_array_equal(program.result()["y"], 2 * (np.asarray(x) + 1))


@pytest.mark.parametrize("axis", [1, -1])
def test_reference_equals_oracle(rng, axis):
    """Cover more features than one block holds."""
    shape = Shape("", (6, 20, 3, 18), axis)
    task = some_task(rng, shape, loc=3.0, momentum=0.0)
    given = {name: getattr(task, name) for name in Case._fields if hasattr(task, name)}
    zeros = np.zeros(task.features)
    case = Case(**given, dmean=zeros, dvar=zeros)
    expected = train_step(case, axis=axis, momentum=0.0, unbiased=False)
    got = _task.reference(task)
    for name in got._fields:
        np.testing.assert_allclose(
            getattr(got, name),
            getattr(expected, name),
            rtol=1e-5,
            atol=1e-6,
            err_msg=name,
        )


@pytest.mark.parametrize("name", ["jaxbn", "jaxbn.linen", "flax.nnx"])
def test_run_step_equals_reference_on_every_task(rng, name):
    """The programs of the first task also run the second, as for the accuracy."""
    tasks = [some_task(rng, loc=loc, momentum=0.0) for loc in (0.0, 2.0)]
    layers = [_libraries.LIBRARIES[name].build(task) for task in tasks]
    programs = _programs.step(tasks[0], layers[0])
    for task, layer in zip(tasks, layers, strict=True):
        got = _programs.run_step(task, layer, *programs)
        expected = _task.reference(task)
        assert _task.find_mismatch(task, got, expected) is None
        np.testing.assert_allclose(got.mean, expected.mean, atol=1e-5)
        np.testing.assert_allclose(got.var, expected.var, rtol=1e-5)


@pytest.mark.parametrize("name", ["y", "dx", "dscale", "dbias"])
def test_find_mismatch_names_wrong_result(rng, name):
    task = some_task(rng)
    expected = _task.reference(task)
    wrong = expected._replace(**{name: 1.01 * getattr(expected, name)})
    assert _task.find_mismatch(task, expected, expected) is None
    assert _task.find_mismatch(task, wrong, expected) == (
        f"{name} is off by 0.01 of its largest entry"
    )
    nan = expected._replace(**{name: np.nan * getattr(expected, name)})
    assert name in _task.find_mismatch(task, nan, expected)


def test_result_avals_count_each_residual_once(rng):
    """jaxbn keeps x, which is an input, and vectors."""
    task = some_task(rng, Shape("", (512, 4)))
    layer = _libraries.LIBRARIES["jaxbn"].build(task)
    residuals = _programs.forward(layer, jnp.asarray(task.x)).result_avals(2)
    assert [aval.shape for aval in residuals].count((512, 4)) == 1
    assert sum(aval.size for aval in residuals) < 2 * 512 * 4


def test_available_reports_missing_libraries(monkeypatch):
    absent = _libraries.Library(_libraries.haiku, "no_such_module")
    monkeypatch.setitem(_libraries.LIBRARIES, "absent", absent)
    found, missing = _libraries.available(["jaxbn", "absent"])
    assert list(found) == ["jaxbn"]
    assert missing == {"absent": "No module named 'no_such_module'"}


def test_torch_reports_missing_interpreter():
    torch = Torch("no_such_interpreter")
    torch.close()
    assert torch.version is None
    assert torch.missing == "No such file or directory"


def test_parse_arguments_rejects_unknown_names(capsys):
    for option in ("--only", "--libraries"):
        with pytest.raises(SystemExit):
            parse_arguments([option, "jaxbn,nonsense"])
        assert "there is no" in capsys.readouterr().err


def test_collectives_reads_kinds_and_bytes():
    text = """
    %a = f32[2,3]{1,0} all-reduce(%x), channel_id=1
    ROOT %b = (f32[4]{0}, bf16[2]{0}) all-gather-start(%y), dimensions={0}
    %c = f32[8]{0} add(%all-reduce, %y)
    """
    assert _devices.collectives(text) == [("all-reduce", 24), ("all-gather", 20)]


def row(library, shape, median, phase="both", dtype="float32"):
    case = {"dims": [4, 2], "floor": 1.0, "rounds": 3, "ratio": median}
    times = {"median": median, "low": median, "high": median}
    names = {"library": library, "shape": shape, "phase": phase, "dtype": dtype}
    return case | times | names


ROWS = [
    row("jaxbn", "a", 1.0),
    row("jaxbn", "b", 2.0),
    row("flax.linen", "a", 4.0),
    row("flax.linen", "b", 2.0),
    row("torch channels-last", "a", 8.0),
    row("torch contiguous", "a", 0.5),
]


def test_summary_has_ratios_and_faster_torch():
    found = {r["library"]: r for r in _layers.summary(ROWS)}
    assert math.isclose(found["flax.linen"]["geometric_mean"], 2.0)
    assert (found["flax.linen"]["below_1"], found["flax.linen"]["shapes"]) == (0, 2)
    torch = found["torch, faster layout"]
    assert (torch["geometric_mean"], torch["below_1"], torch["shapes"]) == (0.5, 1, 1)
    assert "jaxbn" not in found


def test_summary_begins_with_one_jit():
    rows = [
        row(library, "a", 1.0, phase)
        for library in ("jaxbn", "keras")
        for phase in ("both", "forward", "one jit")
    ]
    (table,) = _report.pages(
        {
            "section": "layers",
            "rows": rows,
            "rejected": [],
            "summary": _layers.summary(rows),
        }
    )["layers-summary"]
    expected = ["library", "float32 one jit", "float32 forward", "float32 both"]
    assert table.header == expected


def test_one_jit_of_torch_is_forward_and_backward_in_turn():
    samples = {
        ("jaxbn", "one jit"): [5.0],
        ("jaxbn", "forward"): [2.0],
        ("jaxbn", "backward"): [4.0],
        ("torch contiguous", "forward"): [1.0],
        ("torch contiguous", "backward"): [3.0],
    }
    rows = _layers.rows_of(samples, 1.0, {"shape": "a", "dtype": "float32"})
    times = {(r["library"], r["phase"]): r["median"] for r in rows}
    assert times["jaxbn", "one jit"] == 5
    assert times["torch contiguous", "one jit"] == 4
    assert times["jaxbn", "both"] == 6


def test_compile_programs_train_through_all_layers(rng):
    """Two layers show that each one has a gradient and new state, as Flax's have."""
    task = some_task(rng, _compile.SHAPES[0])
    kernels = rng.normal(size=(2, 32, 32)).astype(np.float32)
    results = []
    for name in _compile.LIBRARIES:
        layer = _libraries.LIBRARIES[name].build(task)
        arguments = _compile.network_arguments(layer, kernels, task.x)
        step, forward = _compile.programs(layer).values()
        grads, state = step(*arguments)
        assert all(jnp.any(grad) for grad in jax.tree.leaves(grads))
        y, same_state = forward(*arguments)
        jax.tree.map(assert_near, state, same_state)
        results.append((y, [kernel_grad for kernel_grad, _ in grads]))
    for result in results[1:]:
        jax.tree.map(assert_near, result, results[0])


def assert_near(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_cpu_seconds_times_lowering_and_compilation():
    seconds = _compile.cpu_seconds(lambda x: x + 1, (jnp.ones(2),))
    assert seconds.keys() == {*_compile.STAGES}
    assert min(seconds.values()) > 0
    assert math.isclose(seconds["lower"] + seconds["compile"], seconds["together"])


def test_summarize_stages_divides_by_flax():
    flax = {"lower": 1.0, "compile": 2.0, "together": 3.0}
    jaxbn = {"lower": 0.5, "compile": 3.0, "together": 3.5}
    samples = {("flax.linen", "forward"): [flax] * 3, ("jaxbn", "forward"): [jaxbn] * 3}
    rows = _compile.summarize_stages(samples)
    assert [row["ratio"] for row in rows] == [1.0, 1.0, 1.0, 0.5, 1.5, 3.5 / 3]
    del samples["flax.linen", "forward"]
    assert [row["ratio"] for row in _compile.summarize_stages(samples)] == [None] * 3


def test_compile_table_has_a_line_per_program_and_library():
    seconds = {"lower": 1.0, "compile": 2.0, "together": 3.0}
    rows = _compile.summarize_stages({("flax.linen", "forward"): [seconds]})
    rows = [{"dims": [128, 32]} | row for row in rows]
    data = {"section": "compile", "rows": rows, "depth": 50}
    (table,) = _report.pages(data)["compile"]
    cells = [f"{s:.2f} ±0%" for s in seconds.values()]
    ones = [cell for s in cells for cell in (s, "1.00")]
    assert table.rows == [["128x32", "forward", "flax.linen", *ones]]


@pytest.mark.parametrize("name", _ensemble.LIBRARIES)
def test_every_member_of_an_ensemble_equals_reference(name, rng):
    task = some_task(rng, momentum=0.0)
    layer = _libraries.LIBRARIES[name].build(task)
    program = _ensemble.ensemble_step(task, layer, 3)
    expected = _task.reference(task)
    _ensemble.check_members(task, layer, program, expected, 3)
    wrong = expected._replace(dx=expected.dx + 1)
    with pytest.raises(RuntimeError, match="member 0 of 3: dx is off by"):
        _ensemble.check_members(task, layer, program, wrong, 3)


@pytest.mark.parametrize("kind", _masks.KINDS)
def test_masked_steps_agree_and_use_the_mask(kind, rng):
    """The batch's statistics are of the kept positions alone."""
    task = some_task(rng, momentum=0.0)
    layers = {n: _libraries.LIBRARIES[n].build(task) for n in _masks.LIBRARIES}
    mask = _masks.random_mask(rng, kind, task.shape)
    steps = {n: _masks.masked_step(task, layers[n], mask) for n in layers}
    _masks.check_agreement(task, layers, steps)
    kept = np.broadcast_to(True if mask is None else mask, task.x.shape)
    mean = task.x.mean(tuple(range(task.x.ndim - 1)), where=kept)
    for name, layer in layers.items():
        results = _masks.run_step(layer, steps[name])
        np.testing.assert_allclose(results.mean, mean, atol=1e-5)
    first = np.arange(16).reshape(16, 1, 1, 1) < 4
    other = {"flax.linen": _masks.masked_step(task, layers["flax.linen"], first)}
    with pytest.raises(RuntimeError, match="versus jaxbn: y is off by"):
        _masks.check_agreement(task, layers, steps | other)


@pytest.mark.parametrize("name", _drift.LIBRARIES)
def test_drift_is_measured_from_the_float64_average(name, rng):
    """Near zero no library drifts."""
    task = some_task(rng, _drift.SHAPE, momentum=0.9)
    xs = rng.normal(size=(4, *_drift.SHAPE.dims)).astype(np.float32)
    layer, steps = _libraries.LIBRARIES[name].build(task), _drift.num_steps(0.9)
    expected = task.mean.astype(np.float64)
    for step in range(steps):
        expected = 0.9 * expected + 0.1 * xs[step % 4].mean(0, dtype=np.float64)
    average = _drift.moving_average(xs, task.mean, 0.9)
    np.testing.assert_allclose(average, expected, atol=1e-12)
    np.testing.assert_allclose(
        _drift.running_mean(layer, xs, steps), expected, atol=1e-6
    )


def layers_data() -> dict:
    metadata = {"seed": 0, "quick": True, "machine": {}, "versions": {}, "missing": {}}
    summary = _layers.summary(ROWS)
    found = {"rows": ROWS, "rejected": [], "summary": summary, "flags": {}}
    return {"section": "layers", "command": "python -m benchmarks"} | metadata | found


def test_save_writes_json_and_tables(tmp_path):
    data = layers_data()
    _report.save(data | {"worst": math.nan}, tmp_path)
    saved = json.loads((tmp_path / "layers.json").read_text())
    keys = ("section", "command", "quick", "seed", "machine", "versions", "flags")
    assert {*keys, "missing", "rows"} <= saved.keys()
    assert saved["worst"] is None
    assert saved["rows"] == ROWS
    assert "| torch, faster layout | 0.50<br>(1 of 1) |" in (
        (tmp_path / "layers-summary.md").read_text()
    )


def test_fill_replaces_text_between_marks():
    page = (
        "a\n<!-- table: x -->\nold\n<!-- end -->\nb\n<!-- table: y -->\n<!-- end -->\n"
    )
    filled = _report.fill(page, "x", "new \\1\n")
    assert filled == page.replace("old\n", "new \\1\n")


def test_shapes_have_unique_names_and_16_features():
    assert len({shape.name for shape in ALL}) == len(ALL)
    assert all(shape.dims[shape.axis] >= 16 for shape in ALL)


def test_accelerator_times_one_layer_in_every_library(rng, monkeypatch):
    monkeypatch.setattr(accelerator, "SAMPLE_SECONDS", 0.0)
    rows = accelerator.time_layer(SMALL, "float32", rng)
    assert [row["library"] for row in rows] == ["jaxbn", "flax.linen"]
    assert len({row["floor"] for row in rows}) == 1
    assert all(0 < row["low"] <= row["median"] <= row["high"] for row in rows)


def test_accelerator_writes_milliseconds_and_the_ratio_to_the_floor():
    case = {"dims": [4, 2], "dtype": "float32", "floor": 2e-3}
    rows = [
        case | {"library": name, "median": seconds}
        for name, seconds in (("jaxbn", 3e-3), ("flax.linen", 4e-3))
    ]
    table = accelerator.layer_table(rows, "chip")
    assert table.header == ["x", "dtype", "jaxbn", "flax.linen"]
    assert table.rows == [["4x2", "float32", "3 (1.50)", "4 (2.00)"]]
    step = {"dtype": "float32", "norm": "flax", "kept": "everything"}
    figures = {"median": 0.0315, "temporary": 5_670_000_000, "loss": 7.25}
    (row,) = accelerator.step_table([step | figures], "chip").rows
    assert row == ["float32", "flax", "everything", "31.50", "5.67", "7.2500"]
