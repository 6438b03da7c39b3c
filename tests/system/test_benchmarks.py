"""The benchmarks' own parts: arithmetic, checks, files. Nothing is timed here."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import Case, train_step

from benchmarks import _devices, _layers, _peers, _programs, _report, _task, _timing
from benchmarks.__main__ import arguments
from benchmarks._shapes import ALL, Shape
from benchmarks._torch import Torch

pytestmark = pytest.mark.usefixtures("standard_promotion", "any_rank")


SMALL = Shape("", (16, 3, 2, 5))


def some_task(rng, shape=SMALL, **options):
    return _task.random_task(rng, shape, "float32", **options)


def test_the_floor_of_8_passes_is_four_copies():
    """A copy makes two passes: one reads, one writes."""
    assert _timing.floor(0.5, 8) == 4 * 0.5
    assert _layers.PASSES["forward"] + _layers.PASSES["backward"] == 8


def test_interleave_runs_every_case_once_a_round(rng):
    order = []
    cases = {name: lambda name=name: order.append(name) or 1.0 for name in "abc"}
    samples = _timing.interleave(cases, 5, rng)
    assert samples == {name: [1.0] * 5 for name in "abc"}
    rounds = ["".join(sorted(order[i : i + 3])) for i in range(0, 15, 3)]
    assert rounds == ["abc"] * 5
    assert len({tuple(order[i : i + 3]) for i in range(0, 15, 3)}) > 1


def test_interleave_stops_at_the_limit_after_three_rounds(rng):
    samples = _timing.interleave({"a": lambda: 1.0}, 50, rng, limit=0)
    assert len(samples["a"]) == 3


def test_median_and_quartiles():
    assert _timing.summarize([9.0, 1.0, 3.0, 2.0, 4.0]) == (3.0, 2.0, 4.0)


def test_geometric_mean_of_a_ratio_and_its_inverse():
    assert math.isclose(_timing.geometric_mean([4.0, 0.25, 8.0]), 2.0)


def test_handed_on_inputs_and_repeats_are_not_computed():
    def function(x, y):
        total = x + y
        return x, total, y, total, x * y

    jaxpr = jax.make_jaxpr(function)(1.0, 2.0).jaxpr
    assert _programs.split_outputs(jaxpr) == ([1, 4], [0, 2, 1, 2, 3])


def test_a_program_recycles_its_outputs_and_keeps_its_inputs(rng):
    x = jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)
    program = _programs.Program(lambda x: {"x": x, "y": 2 * x}, x)
    for _ in range(2):
        program()
    result = program.result()
    assert result["x"] is x
    np.testing.assert_array_equal(result["y"], 2 * np.asarray(x))
    program()
    assert result["y"].is_deleted()
    program.feed(x + 1)
    program()
    np.testing.assert_array_equal(program.result()["y"], 2 * (np.asarray(x) + 1))


@pytest.mark.parametrize("axis", [1, -1])
def test_the_truth_is_the_oracles(rng, axis):
    """Also in blocks of channels: there are more than one block holds."""
    shape = Shape("", (6, 20, 3, 18), axis)
    task = some_task(rng, shape, loc=3.0, momentum=0.0)
    given = {name: getattr(task, name) for name in Case._fields if hasattr(task, name)}
    zeros = np.zeros(task.features)
    case = Case(**given, dmean=zeros, dvar=zeros)
    want = train_step(case, axis=axis, momentum=0.0, unbiased=False)
    got = _task.truth(task)
    for name in got._fields:
        np.testing.assert_allclose(
            getattr(got, name), getattr(want, name), rtol=1e-5, atol=1e-6, err_msg=name
        )


@pytest.mark.parametrize("name", ["jaxbn", "jaxbn.linen", "flax.nnx"])
def test_a_peer_computes_the_truth_again_and_again(rng, name):
    """On a second task by the programs of the first, as the accuracy is measured."""
    tasks = [some_task(rng, loc=loc, momentum=0.0) for loc in (0.0, 2.0)]
    layers = [_peers.PEERS[name].build(task) for task in tasks]
    programs = _programs.step(tasks[0], layers[0])
    for task, layer in zip(tasks, layers, strict=True):
        got = _programs.rerun(task, layer, *programs)
        want = _task.truth(task)
        assert _task.disagreement(task, got, want) is None
        np.testing.assert_allclose(got.mean, want.mean, atol=1e-5)
        np.testing.assert_allclose(got.var, want.var, rtol=1e-5)


@pytest.mark.parametrize("name", ["y", "dx", "dscale", "dbias"])
def test_a_peer_that_computes_something_else_is_refused(rng, name):
    task = some_task(rng)
    want = _task.truth(task)
    off = want._replace(**{name: 1.01 * getattr(want, name)})
    assert _task.disagreement(task, want, want) is None
    assert _task.disagreement(task, off, want) == (
        f"{name} is off by 0.01 of its largest entry"
    )
    nan = want._replace(**{name: np.nan * getattr(want, name)})
    assert name in _task.disagreement(task, nan, want)


def test_residuals_are_counted_once(rng):
    """jaxbn's: x, which is an input, and vectors, none of x's size."""
    task = some_task(rng, Shape("", (512, 4)))
    layer = _peers.PEERS["jaxbn"].build(task)
    held = _programs.forward(layer, jnp.asarray(task.x)).held(2)
    assert [aval.shape for aval in held].count((512, 4)) == 1
    assert sum(aval.size for aval in held) < 2 * 512 * 4


def test_missing_peers_are_named(monkeypatch):
    absent = _peers.Peer(_peers.haiku, "no_such_module")
    monkeypatch.setitem(_peers.PEERS, "absent", absent)
    found, missing = _peers.available(["jaxbn", "absent"])
    assert list(found) == ["jaxbn"]
    assert missing == {"absent": "No module named 'no_such_module'"}


def test_missing_torch_is_named():
    torch = Torch("no_such_interpreter")
    torch.close()
    assert torch.version is None
    assert torch.missing == "No such file or directory"


def test_unknown_names_are_refused(capsys):
    for option in ("--only", "--peers"):
        with pytest.raises(SystemExit):
            arguments([option, "jaxbn,nonsense"])
        assert "there is no" in capsys.readouterr().err


def test_collectives_are_counted_from_text():
    text = """
    %a = f32[2,3]{1,0} all-reduce(%x), channel_id=1
    ROOT %b = (f32[4]{0}, bf16[2]{0}) all-gather-start(%y), dimensions={0}
    %c = f32[8]{0} add(%all-reduce, %y)
    """
    assert _devices.collectives(text) == [("all-reduce", 24), ("all-gather", 20)]


def row(peer, shape, median, work="both", dtype="float32"):
    about = {"dims": [4, 2], "floor": 1.0, "rounds": 3, "ratio": median}
    times = {"median": median, "low": median, "high": median}
    names = {"peer": peer, "shape": shape, "work": work, "dtype": dtype}
    return about | times | names


ROWS = [
    row("jaxbn", "a", 1.0),
    row("jaxbn", "b", 2.0),
    row("flax.linen", "a", 4.0),
    row("flax.linen", "b", 2.0),
    row("torch channels-last", "a", 8.0),
    row("torch contiguous", "a", 0.5),
]


def test_the_summary_has_wins_and_losses():
    """And torch in the layout that was faster."""
    found = {r["peer"]: r for r in _layers.summary(ROWS)}
    assert math.isclose(found["flax.linen"]["geometric_mean"], 2.0)
    assert (found["flax.linen"]["below_1"], found["flax.linen"]["shapes"]) == (0, 2)
    torch = found["torch, faster layout"]
    assert (torch["geometric_mean"], torch["below_1"], torch["shapes"]) == (0.5, 1, 1)
    assert "jaxbn" not in found


def layers_data() -> dict:
    about = {"seed": 0, "quick": True, "machine": {}, "versions": {}, "missing": {}}
    summary = _layers.summary(ROWS)
    found = {"rows": ROWS, "refused": [], "summary": summary, "flags": {}}
    return {"section": "layers", "command": "python -m benchmarks"} | about | found


def test_json_and_tables_of_a_section(tmp_path):
    data = layers_data()
    _report.save(data | {"worst": math.nan}, tmp_path)
    saved = json.loads((tmp_path / "layers.json").read_text())
    about = ("section", "command", "quick", "seed", "machine", "versions", "flags")
    assert {*about, "missing", "rows"} <= saved.keys()
    assert saved["worst"] is None
    assert saved["rows"] == ROWS
    assert "| torch, faster layout | 0.50<br>(1 of 1) |" in (
        (tmp_path / "layers.md").read_text()
    )


def test_the_page_is_filled_between_its_marks():
    page = (
        "a\n<!-- table: x -->\nold\n<!-- end -->\nb\n<!-- table: y -->\n<!-- end -->\n"
    )
    filled = _report.fill(page, "x", "new \\1\n")
    assert filled == page.replace("old\n", "new \\1\n")


def test_every_shape_has_its_own_name_and_a_feature_axis():
    assert len({shape.name for shape in ALL}) == len(ALL)
    assert all(shape.dims[shape.axis] >= 16 for shape in ALL)
