"""Test the figures of the README, of the performance summary and of the tables."""

import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from pages import DOCS

import jaxbn
from benchmarks._timing import geometric_mean

RESULTS = DOCS.parent / "benchmarks/results"
README = DOCS.parent / "README.md"
SUMMARY = DOCS / "performance.md"


def read_tables(path: Path) -> Iterator[list[list[str]]]:
    """Yield the cells of each table, the header first."""
    for table in re.findall(r"(?:^\|.*\n)+", path.read_text(), re.MULTILINE):
        lines = [line.strip("|") for line in table.splitlines()]
        header, _, *rows = [[c.strip() for c in line.split("|")] for line in lines]
        yield [header, *rows]


def as_dicts(table: list[list[str]]) -> list[dict[str, str]]:
    """Return the rows by the header, the last of columns of one name."""
    header, *rows = table
    return [dict(zip(header, row, strict=True)) for row in rows]


def say(path: Path, *figures: str) -> None:
    """Assert that a page says all figures, between spaces and punctuation."""
    text = path.read_text()
    for figure in figures:
        assert re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d]|\.\d)", text), figure


SHORT = {
    "Keras on JAX": "keras",
    "PyTorch, channels last": "torch channels-last",
    "PyTorch, contiguous": "torch contiguous",
}


LAYERS = RESULTS / "layers-summary.md"
PROGRAMS = "float32 one jit", "bfloat16 one jit", "float32 both", "bfloat16 both"


def results_of_layers() -> dict[str, list[str]]:
    """Return each library's ratios and counts, in the order of `PROGRAMS`."""
    (results,) = read_tables(LAYERS)
    return {
        row["library"]: [row[name].replace("<br>", " ") for name in PROGRAMS]
        for row in as_dicts(results)
    }


def test_times_are_the_results():
    *_, (_, *rows) = read_tables(SUMMARY)
    results = results_of_layers()
    assert len(rows) == 7
    for library, *cells in rows:
        assert cells == results[SHORT.get(library, library)]


def test_pages_say_times_in_one_jit_as_the_results_do():
    results = results_of_layers()

    def ratios(library: str) -> list[str]:
        return [cell.split()[0] for cell in results[library][:2]]

    say(README, "{} in float32 and {} in bfloat16".format(*ratios("flax.linen")))
    say(README, " and ".join(ratios("torch channels-last")))
    say(SUMMARY, *ratios("torch, faster layout"))


def test_summary_says_the_smallest_shape_as_the_results_do():
    """It is the only one that is slower than flax.linen in one jit."""
    rows = json.loads((RESULTS / "layers.json").read_text())["rows"]
    for dtype in ("float32", "bfloat16"):
        times = {
            library: {
                row["shape"]: row["median"]
                for row in rows
                if (row["phase"], row["dtype"]) == ("one jit", dtype)
                and row["library"] == library
            }
            for library in ("jaxbn", "flax.linen")
        }
        ratios = {s: times["flax.linen"][s] / t for s, t in times["jaxbn"].items()}
        assert [shape for shape, ratio in ratios.items() if ratio < 1] == ["tiny"]
        say(SUMMARY, f"{ratios['tiny']:.2f} in")


@pytest.mark.parametrize(
    ("program", "losses"), [("training step", [False, True]), ("forward", [True, True])]
)
def test_compile_times_are_the_results(program, losses):
    ((_, *results),) = read_tables(RESULTS / "compile.md")
    ratios = {"jaxbn": [], "jaxbn.linen": [], "flax.linen": []}
    for row in results:
        if row[1] == program:
            ratios[row[2]].append(row[-1])  # tracing and compiling together
    say(SUMMARY, " and ".join(ratios["jaxbn"]), " and ".join(ratios["jaxbn.linen"]))
    say(README, " to ".join(sorted(ratios["jaxbn"])))
    assert [float(ratio) > 1 for ratio in ratios["jaxbn"]] == losses


def test_vmap_times_are_the_results():
    summary, *_ = read_tables(RESULTS / "ensemble.md")
    (result,) = as_dicts(summary)
    ratio = {name: cell.split("<")[0] for name, cell in result.items()}
    float32, bfloat16 = (f"{d} 4 members" for d in ("float32", "bfloat16"))
    say(SUMMARY, ratio[float32], ratio[bfloat16])
    say(SUMMARY, f"{ratio['float32 16 members']} and {ratio['bfloat16 16 members']}")
    say(README, *(f"{float(ratio[name]):.1f}" for name in (float32, bfloat16)))


def test_times_with_masks_are_the_results():
    summary, *_ = read_tables(RESULTS / "masks.md")
    (result,) = as_dicts(summary)
    ratio = {name: cell.split("<")[0] for name, cell in result.items()}
    float32, bfloat16 = (f"{d} mask of examples" for d in ("float32", "bfloat16"))
    say(SUMMARY, f"{ratio[float32]} times as long in float32 and {ratio[bfloat16]}")
    float32, bfloat16 = (f"{d} mask of positions" for d in ("float32", "bfloat16"))
    say(SUMMARY, f"{ratio[float32]} and {ratio[bfloat16]}")


def test_summary_says_how_much_a_mask_adds():
    rows = json.loads((RESULTS / "masks.json").read_text())["rows"]
    times: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row["library"] == "jaxbn":
            case = row["dtype"], row["phase"]
            times.setdefault(case, []).append(row["median"])
    means = {case: geometric_mean(medians) for case, medians in times.items()}
    added = [
        round(100 * (mean / means[dtype, "no mask"] - 1))
        for (dtype, kind), mean in means.items()
        if kind != "no mask"
    ]
    say(SUMMARY, f"{min(added)} to {max(added)}%")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_summary_says_times_in_one_jit_over_the_floor(dtype):
    rows = json.loads((RESULTS / "layers.json").read_text())["rows"]
    ratios = {
        row["shape"]: row["ratio"]
        for row in rows
        if (row["library"], row["phase"], row["dtype"]) == ("jaxbn", "one jit", dtype)
    }
    say(SUMMARY, f"{ratios.pop('tiny'):.1f}")
    say(SUMMARY, f"{min(ratios.values()):.1f} to {max(ratios.values()):.1f} times")


def test_step_times_are_the_results():
    (results,) = read_tables(RESULTS / "step.md")
    say(SUMMARY, *(row["ms"].split()[0] for row in as_dicts(results)))


def steps_of(chip: str, **case: str | int) -> list[dict[str, Any]]:
    """Return the figures of jaxbn's and of Flax's step, counted for this chip."""
    case = {"kept": "everything", "chips": 1} | case
    steps = json.loads((RESULTS / f"aot-{chip}.json").read_text())["steps"]
    found = [step for step in steps if case.items() <= step.items()]
    return sorted(found, key=lambda step: step["norm"], reverse=True)


def tpu_ratio(network: str, batch: int, chips: int, dtype: str, figure: str) -> str:
    case = {"network": network, "batch": batch, "chips": chips, "dtype": dtype}
    own, flax = steps_of("v5e", **case)
    assert own["all_reduces"] <= flax["all_reduces"]
    return f"{own[figure] / flax[figure]:.2f}"


def test_tpu_steps_are_the_results():
    (_, *rows), *_ = read_tables(SUMMARY)
    networks = [("ResNet-50", 32, 1), ("ResNet-50", 128, 1)]
    networks += [("stem + 2 bottlenecks", 128, chips) for chips in (1, 4)]
    for (_, *cells), network in zip(rows, networks, strict=True):
        assert cells == [
            tpu_ratio(*network, dtype, figure)
            for figure in ("cycles", "traffic")
            for dtype in ("float32", "bfloat16")
        ]
    bfloat16 = rows[0][2], rows[1][2], rows[0][4], rows[1][4]
    say(README, *bfloat16, "{2} and {3} times its bytes".format(*bfloat16))


def test_tpu_layers_are_the_results():
    rows = json.loads((RESULTS / "aot-v5e.json").read_text())["layers"]
    for own, flax in zip(rows[::2], rows[1::2], strict=True):
        for program in ("forward", "both", "backward", "separate"):
            assert own[program] <= 1.0055 * flax[program]


def test_gpu_bytes_are_the_results():
    steps = steps_of("h100", network="ResNet-50", batch=32, dtype="bfloat16")
    say(SUMMARY, *(f"{step['traffic'] / 1e9:.1f}" for step in steps))


def test_memory_of_checkpoints_is_the_results():
    """Relative to Flax's step, which keeps everything; the convolutions as a number."""
    *_, (_, *rows) = read_tables(DOCS / "memory.md")
    kinds = {"the policy": "policy", "`jax.checkpoint` of each block": "blocks"}
    for (name, *cells), chip in zip(rows, ["h100", "v5e"] * 2, strict=True):
        case = {"network": "ResNet-50", "batch": 128, "dtype": "bfloat16"}
        _, flax = steps_of(chip, **case)
        kept, place = name.split(", ")
        (step,) = steps_of(chip, **case, kept=kinds[kept])
        assert place.lower().endswith(chip)
        ratios = [step[name] / flax[name] for name in ("temporary", "traffic")]
        counts = [str(step["convolutions"]), str(flax["convolutions"])]
        assert cells == [f"{ratio:.2f}" for ratio in ratios] + [" versus ".join(counts)]


def test_bytes_kept_are_the_results():
    ((_, *results),) = read_tables(RESULTS / "memory.md")
    kept = {(row[0].lower(), row[1]): float(row[3]) for row in results}
    comparison, _ = read_tables(DOCS / "comparison.md")
    (row,) = [r for r in as_dicts(comparison) if r[""].startswith("kept for the back")]
    for library in comparison[0][2:]:
        expected = kept[library.lower(), "bfloat16"]
        assert row[library].startswith(f"{expected:.0f}×"), library


def test_option_table_states_the_defaults():
    parameters = inspect.signature(jaxbn.batch_norm).parameters
    ((_, *rows),) = read_tables(DOCS / "api/core.md")
    names = [re.findall(r"\w+", cell) for cell, *_ in rows]
    stated = {n: row[1] for row, found in zip(rows, names, strict=True) for n in found}
    _, _, _, _, *options = parameters  # params, state, x and train have no default
    assert list(stated) == options
    for name, default in stated.items():
        assert parameters[name].default == eval(default.strip("`")), name


def test_initial_statistics_keep_37_percent_after_100_steps(rng):
    params, state = jaxbn.init(1)
    x = rng.normal(size=(8, 1)).astype(np.float32)
    x = (x - x.mean()) / x.std()  # the batches add 0 to the mean

    def step(state, _):
        return jaxbn.batch_norm(params, state, x, True)[1], None

    state = state._replace(mean=state.mean + 1)
    after, _ = jax.lax.scan(step, state, None, length=100)
    np.testing.assert_allclose(after.mean, 0.37, atol=0.005)


def test_momentum_and_unbiased_reproduce_pytorch_and_flax(rng):
    """The comparison translates both options."""
    x = rng.normal(size=(10, 3)).astype(np.float32)
    params, state = jaxbn.init(3)
    _, torch_like = jaxbn.batch_norm(params, state, x, True, momentum=0.9)
    _, flax_like = jaxbn.batch_norm(params, state, x, True, unbiased=False)
    variances = [x.astype(np.float64).var(0, ddof=ddof) for ddof in (1, 0)]
    np.testing.assert_allclose(torch_like.var, 0.9 + 0.1 * variances[0], rtol=1e-5)
    np.testing.assert_allclose(flax_like.var, 0.99 + 0.01 * variances[1], rtol=1e-5)
    assert isinstance(torch_like.mean, jax.Array)
