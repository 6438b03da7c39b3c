"""Pictures of the results, in colours that colour-blind readers tell apart."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

# Okabe & Ito, "Color Universal Design", 2008; and markers, for print.
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
DROPPED = ("jaxbn.linen", "jaxbn.nnx")  # where `jaxbn` stands: the same computation


def save(data: dict, folder: Path) -> None:
    """The pictures of a section's data."""
    for name, figure in figures(data).items():
        figure.savefig(folder / f"{name}.png", dpi=110)


def figures(data: dict) -> dict[str, Figure]:
    """By file name."""
    return {
        "layers": _layers,
        "growth": _growth,
        "step": _step,
        "memory": _memory,
        "accuracy": _accuracy,
    }[data["section"]](data)


def _plain_log(axis: Axis, subs: tuple[float, ...] = (1, 2, 5)) -> None:
    """A logarithmic axis with plain numbers on it: 0.5, 1, 2, 5."""
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _peers(rows: list[dict]) -> list[str]:
    return [p for p in STYLES if any(r["peer"] == p for r in rows)]


def _compared(rows: list[dict]) -> list[dict]:
    """Without jaxbn's layers, where the function stands for them."""
    function = any(r["peer"] == "jaxbn" for r in rows)
    return [r for r in rows if not (function and r["peer"] in DROPPED)]


def _layers(data: dict) -> dict[str, Figure]:
    found = {}
    for dtype in dict.fromkeys(r["dtype"] for r in data["rows"]):
        rows = _compared([r for r in data["rows"] if r["dtype"] == dtype])
        found[f"layers_{dtype}"] = _bars(rows, dtype)
        found[f"floor_{dtype}"] = _against_floor(rows, dtype)
    return found


def _bars(rows: list[dict], dtype: str) -> Figure:
    """Forward + backward of each shape, in floors: 1 is all that memory allows."""
    rows = [r for r in rows if r["work"] == "both"]
    shapes = list(dict.fromkeys(r["shape"] for r in rows))
    half = (len(shapes) + 1) // 2
    figure = Figure(figsize=(13, 8), layout="constrained")
    for axes, some in zip(
        figure.subplots(2, 1), (shapes[:half], shapes[half:]), strict=True
    ):
        _grouped(axes, [r for r in rows if r["shape"] in some], "shape", "ratio")
        axes.axhline(1, color="black", lw=0.8, ls="--")
        axes.set(ylabel="time / floor", yscale="log")
        _plain_log(axes.yaxis)
        axes.grid(axis="y", alpha=0.3)
    figure.suptitle(
        f"Training forward + backward, {dtype}: time over the floor, "
        "8 passes over x at copy speed (1 = dashed; lower is better)"
    )
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5)
    return figure


def _grouped(axes: Axes, rows: list[dict], group: str, value: str) -> None:
    """Bars side by side in each group, quartiles as whiskers where there are some."""
    groups = list(dict.fromkeys(r[group] for r in rows))
    peers = _peers(rows)
    axes.set_axisbelow(True)
    width = 0.85 / max(len(peers), 1)
    for k, peer in enumerate(peers):
        some = [r for r in rows if r["peer"] == peer]
        where = [
            groups.index(r[group]) + (k - (len(peers) - 1) / 2) * width for r in some
        ]
        heights = np.array([r[value] for r in some])
        colour = STYLES[peer][0]
        axes.bar(where, heights, width * 0.92, color=colour, label=peer)
        if "median" in some[0]:
            scale = heights / [r["median"] for r in some]
            low, high = (scale * [r[end] for r in some] for end in ("low", "high"))
            error = np.abs([heights - low, high - heights])
            axes.errorbar(where, heights, error, fmt="none", ecolor="#666666", lw=1)
    axes.set_xticks(range(len(groups)), [str(g).replace(" ", "\n", 1) for g in groups])


def _against_floor(rows: list[dict], dtype: str) -> Figure:
    """A point for each shape and peer; on the diagonal, nothing could be faster."""
    figure = Figure(figsize=(12, 5.5), layout="constrained")
    for axes, work in zip(figure.subplots(1, 2), ("forward", "backward"), strict=True):
        some = [r for r in rows if r["work"] == work]
        floors = sorted(1e3 * r["floor"] for r in some)
        axes.loglog(floors, floors, color="black", lw=0.8, ls="--", label="floor")
        for peer in _peers(some):
            points = [(r["floor"], r["median"]) for r in some if r["peer"] == peer]
            colour, marker = STYLES[peer]
            xs, ys = 1e3 * np.array(points).T
            above = 5 if peer == "jaxbn" else 2
            style = {"color": colour, "mec": "black", "mew": 0.3, "zorder": above}
            axes.plot(xs, ys, marker, label=peer, **style)
        axes.set(title=work, xlabel="floor, ms", ylabel="time, ms")
        for axis in (axes.xaxis, axes.yaxis):
            _plain_log(axis)
        axes.grid(alpha=0.3)
    figure.suptitle(f"Time against the floor, {dtype}: one point for each shape")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5)
    return figure


def _growth(data: dict) -> dict[str, Figure]:
    figure = Figure(figsize=(14, 5), layout="constrained")
    *first, last = figure.subplots(1, 3)
    for axes, along in zip(first, ("rows", "channels"), strict=True):
        rows = [r for r in data["rows"] if (r["along"], r["work"]) == (along, "both")]
        place = 0 if along == "rows" else 1
        _lines(axes, rows, lambda r, place=place: r["dims"][place])
        floors = sorted({r["dims"][place]: 1e3 * r["floor"] for r in rows}.items())
        axes.plot(*zip(*floors, strict=True), color="black", ls="--", label="floor")
        other = [r["dims"][1 - place] for r in rows][:1]
        fixed = {"rows": "channels", "channels": "rows"}[along]
        axes.set_title(f"{along}, with {other[0]} {fixed}" if other else along)
        axes.set(xlabel=along, ylabel="forward + backward, ms", yscale="log")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.tick_params(axis="x", labelrotation=30)
        _plain_log(axes.yaxis)
        axes.legend()
    both = [r for r in data["devices"] if r["work"] == "both"]
    _lines(last, both, lambda r: r["devices"])
    last.set(title="the same batch on CPU devices (the cores stay)", ylim=(0, None))
    last.set(xlabel="devices", ylabel="forward + backward, ms", xticks=(1, 2, 4, 8))
    last.legend()
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    figure.suptitle("How time grows, float32 (medians; bands: quartiles)")
    return {"growth": figure}


def _lines(axes: Axes, rows: list[dict], where: Callable[[dict], int]) -> None:
    """Medians with a band between the quartiles, against what `where` says."""
    for peer in _peers(rows):
        some = sorted((r for r in rows if r["peer"] == peer), key=where)
        xs, (colour, marker) = [where(r) for r in some], STYLES[peer]
        low, median, high = (
            [1e3 * r[name] for r in some] for name in ("low", "median", "high")
        )
        axes.plot(xs, median, color=colour, marker=marker, label=peer)
        axes.fill_between(xs, low, high, color=colour, alpha=0.2)


def _step(data: dict) -> dict[str, Figure]:
    rows = data["rows"]
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    medians = 1e3 * np.array([r["median"] for r in rows])
    low, high = (1e3 * np.array([r[end] for r in rows]) for end in ("low", "high"))
    axes.barh(
        [r["peer"] for r in rows],
        medians,
        xerr=[medians - low, high - medians],
        color=[STYLES[r["peer"]][0] for r in rows],
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
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    rows = [
        r | {name: r[name] / r["x"] for name in ("residuals", "scan_peak")}
        for r in _compared(data["rows"])
    ]
    titles = {
        "residuals": "kept by jax.vjp of one layer",
        "scan_peak": f"temporaries, gradient of a scan over {data['layers']} layers",
    }
    for axes, (name, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        _grouped(axes, rows, "dtype", name)
        axes.set(title=title, ylabel="times the bytes of x")
        axes.grid(axis="y", alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6)
    return {"memory": figure}


def _accuracy(data: dict) -> dict[str, Figure]:
    rows = _compared([r for r in data["rows"] if r["dtype"] == "float32"])
    figure = Figure(figsize=(13, 4.8), layout="constrained")
    titles = {
        "mean": "mean, in deviations",
        "var": "variance, relative",
        "dx": "dx, of its largest entry",
    }
    for axes, (name, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        shown = [r | {"at": f"mean {r['loc']:g}"} for r in rows]
        for r in shown:  # NaN reaches the top of the picture
            r[name] = r[name] if r[name] is not None and r[name] == r[name] else 1e9
        _grouped(axes, shown, "at", name)
        axes.set(title=title, yscale="log", ylabel="largest error", ylim=(1e-9, 1e2))
        axes.grid(axis="y", alpha=0.3)
    figure.suptitle(
        "Error against float64 of float32 x with deviation 1, 4096x64 "
        "(bars at the top: 100 and more, or NaN)"
    )
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=8)
    return {"accuracy": figure}
