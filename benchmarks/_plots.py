"""Plots of the results, in colours that colour-blind readers can distinguish."""

from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

# Colours of Okabe & Ito, "Color Universal Design", 2008; markers for print.
STYLES = {
    "jaxbn": ("#000000", "o"),
    "jaxbn.linen": ("#000000", "o"),
    "flax.linen": ("#E69F00", "s"),
    "flax.nnx": ("#F0E442", "D"),
    "dm-haiku": ("#56B4E9", "^"),
    "equinox": ("#CC79A7", "v"),
    "keras": ("#009E73", "P"),
    "torch channels-last": ("#0072B2", "X"),
    "torch contiguous": ("#D55E00", "*"),
    "no batch norm": ("#999999", "."),
}
DUPLICATES = ("jaxbn.linen", "jaxbn.nnx")  # of `jaxbn`: the same computation
matplotlib.rcParams["font.size"] = 13  # legible on a phone


def save(data: dict, folder: Path) -> None:
    """Save the plots of a section as PNG files."""
    for name, figure in figures(data).items():
        figure.savefig(folder / f"{name}.png", dpi=110)


def figures(data: dict) -> dict[str, Figure]:
    """Return the plots of a section by file name."""
    return {
        "layers": _layers,
        "growth": _growth,
        "step": _step,
        "compile": lambda data: {},  # a short table
        "drift": lambda data: {},
        "ensemble": lambda data: {},
        "masks": lambda data: {},
        "memory": _memory,
        "accuracy": _accuracy,
    }[data["section"]](data)


def _plain_log(axis: Axis, subs: tuple[float, ...] = (1, 2, 5)) -> None:
    """Label a logarithmic axis with plain numbers: 0.5, 1, 2, 5."""
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _libraries(rows: list[dict]) -> list[str]:
    return [name for name in STYLES if any(r["library"] == name for r in rows)]


def _without_duplicates(rows: list[dict]) -> list[dict]:
    """Drop jaxbn's layers if the function is included."""
    function = any(r["library"] == "jaxbn" for r in rows)
    return [r for r in rows if not (function and r["library"] in DUPLICATES)]


def _layers(data: dict) -> dict[str, Figure]:
    found = {}
    for dtype in dict.fromkeys(r["dtype"] for r in data["rows"]):
        rows = _without_duplicates([r for r in data["rows"] if r["dtype"] == dtype])
        found[f"layers_{dtype}"] = _bars(rows, dtype)
        found[f"floor_{dtype}"] = _against_floor(rows, dtype)
    return found


def _bars(rows: list[dict], dtype: str) -> Figure:
    """Plot forward + backward of each shape in units of the floor."""
    rows = [r for r in rows if r["phase"] == "both"]
    shapes = list(dict.fromkeys(r["shape"] for r in rows))
    figure = Figure(figsize=(10, 11), layout="constrained")
    parts = [shapes[start : start + 6] for start in range(0, len(shapes), 6)]
    panels = figure.subplots(len(parts), 1, squeeze=False)
    for axes, some in zip(panels.flat, parts, strict=True):
        _grouped(axes, [r for r in rows if r["shape"] in some], "shape", "ratio")
        axes.axhline(1, color="black", lw=0.8, ls="--")
        axes.set(ylabel="time / floor", yscale="log")
        _plain_log(axes.yaxis)
        axes.grid(axis="y", alpha=0.3)
    figure.suptitle(
        f"Training forward + backward, {dtype}: time over the floor, 8 passes over x\n"
        "at copy speed (1 = dashed; lower is better)"
    )
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def _grouped(axes: Axes, rows: list[dict], group: str, value: str) -> None:
    """Draw a bar per library in each group, with quartiles as whiskers if present."""
    groups = list(dict.fromkeys(r[group] for r in rows))
    libraries = _libraries(rows)
    axes.set_axisbelow(True)
    width = 0.85 / max(len(libraries), 1)
    for k, library in enumerate(libraries):
        some = [r for r in rows if r["library"] == library]
        offset = (k - (len(libraries) - 1) / 2) * width
        positions = [groups.index(r[group]) + offset for r in some]
        heights = np.array([r[value] for r in some])
        colour = STYLES[library][0]
        axes.bar(positions, heights, width * 0.92, color=colour, label=library)
        if "median" in some[0]:
            scale = heights / [r["median"] for r in some]
            low, high = (scale * [r[end] for r in some] for end in ("low", "high"))
            error = np.abs([heights - low, high - heights])
            axes.errorbar(positions, heights, error, fmt="none", ecolor="#666666", lw=1)
    axes.set_xticks(range(len(groups)), [str(g).replace(" ", "\n", 1) for g in groups])


def _against_floor(rows: list[dict], dtype: str) -> Figure:
    """Plot a point for each shape and library; the diagonal is the floor."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    for axes, phase in zip(figure.subplots(1, 2), ("forward", "backward"), strict=True):
        some = [r for r in rows if r["phase"] == phase]
        floors = sorted(1e3 * r["floor"] for r in some)
        axes.loglog(floors, floors, color="black", lw=0.8, ls="--", label="floor")
        for library in _libraries(some):
            points = [
                (r["floor"], r["median"]) for r in some if r["library"] == library
            ]
            colour, marker = STYLES[library]
            xs, ys = 1e3 * np.array(points).T
            zorder = 5 if library == "jaxbn" else 2
            style = {"color": colour, "mec": "black", "mew": 0.3, "zorder": zorder}
            axes.plot(xs, ys, marker, label=library, **style)
        axes.set(title=phase, xlabel="floor, ms", ylabel="time, ms")
        for axis in (axes.xaxis, axes.yaxis):
            _plain_log(axis, subs=(1, 3))
        axes.grid(alpha=0.3)
    figure.suptitle(f"Time versus the floor, {dtype}: one point per shape")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def _growth(data: dict) -> dict[str, Figure]:
    figure = Figure(figsize=(10, 9), layout="constrained")
    panels = figure.subplot_mosaic("AB;CC", height_ratios=(3, 2))
    *first, last = panels.values()
    for axes, along in zip(first, ("examples", "features"), strict=True):
        rows = [r for r in data["rows"] if (r["along"], r["phase"]) == (along, "both")]
        dim = 0 if along == "examples" else 1
        _lines(axes, rows, lambda r, dim=dim: r["dims"][dim])
        floors = sorted({r["dims"][dim]: 1e3 * r["floor"] for r in rows}.items())
        axes.plot(*zip(*floors, strict=True), color="black", ls="--", label="floor")
        size = [r["dims"][1 - dim] for r in rows][:1]
        fixed = {"examples": "features", "features": "examples"}[along]
        axes.set_title(f"{along}, with {size[0]} {fixed}" if size else along)
        axes.set(xlabel=along, ylabel="forward + backward, ms", yscale="log")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.tick_params(axis="x", labelrotation=30)
        _plain_log(axes.yaxis)
        axes.legend()
    both = [r for r in data["devices"] if r["phase"] == "both"]
    _lines(last, both, lambda r: r["devices"])
    last.set(title="the same batch on more CPU devices (same cores)", ylim=(0, None))
    last.set(xlabel="devices", ylabel="forward + backward, ms", xticks=(1, 2, 4, 8))
    last.legend()
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    figure.suptitle("Growth of time, float32 (medians; bands: quartiles)")
    return {"growth": figure}


def _lines(axes: Axes, rows: list[dict], position: Callable[[dict], int]) -> None:
    """Plot medians over `position`, with a band between the quartiles."""
    for library in _libraries(rows):
        some = sorted((r for r in rows if r["library"] == library), key=position)
        xs, (colour, marker) = [position(r) for r in some], STYLES[library]
        low, median, high = (
            [1e3 * r[name] for r in some] for name in ("low", "median", "high")
        )
        axes.plot(xs, median, color=colour, marker=marker, label=library)
        axes.fill_between(xs, low, high, color=colour, alpha=0.2)


def _step(data: dict) -> dict[str, Figure]:
    rows = data["rows"]
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    medians = 1e3 * np.array([r["median"] for r in rows])
    low, high = (1e3 * np.array([r[end] for r in rows]) for end in ("low", "high"))
    axes.barh(
        [r["library"] for r in rows],
        medians,
        xerr=[medians - low, high - medians],
        color=[STYLES[r["library"]][0] for r in rows],
        ecolor="#666666",
    )
    axes.invert_yaxis()
    axes.set_xlabel("ms (whiskers: quartiles)")
    axes.set_title(
        f"A training step of ResNet-{rows[0]['layers']}, batch {rows[0]['batch']}, "
        "float32"
    )
    return {"step": figure}


def _memory(data: dict) -> dict[str, Figure]:
    figure = Figure(figsize=(10, 5), layout="constrained")
    rows = [
        r | {name: r[name] / r["x"] for name in ("residuals", "scan_peak")}
        for r in _without_duplicates(data["rows"])
    ]
    depth = data["layers"]
    titles = {
        "residuals": "residuals of jax.vjp,\none layer",
        "scan_peak": f"temporary memory, gradient\nof a scan over {depth} layers",
    }
    for axes, (name, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        _grouped(axes, rows, "dtype", name)
        axes.set(title=title, ylabel="times the bytes of x")
        axes.grid(axis="y", alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return {"memory": figure}


def _accuracy(data: dict) -> dict[str, Figure]:
    rows = _without_duplicates([r for r in data["rows"] if r["dtype"] == "float32"])
    figure = Figure(figsize=(10, 12), layout="constrained")
    titles = {
        "mean": "mean, in standard deviations",
        "var": "variance, relative",
        "dx": "dx, relative to its largest entry",
    }
    for axes, (name, title) in zip(figure.subplots(3, 1), titles.items(), strict=True):
        shown = [r | {"at": f"mean {r['loc']:g}"} for r in rows]
        for r in shown:  # NaN is drawn at the top
            r[name] = r[name] if r[name] is not None and r[name] == r[name] else 1e9
        _grouped(axes, shown, "at", name)
        axes.set(title=title, yscale="log", ylabel="largest error", ylim=(1e-9, 1e2))
        axes.grid(axis="y", alpha=0.3)
    figure.suptitle(
        "Error of float32 versus float64, x of 4096x64 with standard deviation 1\n"
        "(bars at the top: at least 100, or NaN)"
    )
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return {"accuracy": figure}
